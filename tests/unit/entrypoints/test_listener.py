"""The address of a server: nobody is let in before it is announced, everybody from then on."""

import socket

import pytest

from sarathi.entrypoints.server.process.listener import announce, bind, url_of


def test_connections_are_refused_before_the_address_is_announced_and_wait_after_it(
    capsys: pytest.CaptureFixture,
) -> None:
    with bind("127.0.0.1", 0) as listener:
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(listener.getsockname(), timeout=10)
        announce("tiny", listener)
        assert capsys.readouterr().out == f"tiny is served on {url_of(listener)}\n"
        with socket.create_connection(listener.getsockname(), timeout=10) as client, listener.accept()[0] as accepted:
            client.sendall(b"x")
            assert accepted.recv(1) == b"x"


def test_a_taken_port_is_told_with_the_address() -> None:
    with bind("127.0.0.1", 0) as first:
        port = first.getsockname()[1]
        with bind("127.0.0.1", port) as second:  # as long as neither listens
            announce("tiny", first)
            with pytest.raises(OSError, match=f"cannot listen on http://127.0.0.1:{port}: "):
                announce("tiny", second)
        with pytest.raises(OSError, match=f"cannot listen on 127.0.0.1 port {port}: "):
            bind("127.0.0.1", port)
