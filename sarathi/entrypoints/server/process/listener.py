"""The address that a server listens on."""

import socket

BACKLOG = 2048  # connections that wait to be accepted


def bind(host: str, port: int, *, shared: bool = False) -> socket.socket:
    """Before the model is loaded, so that a taken port is told at once; clients are let in later. OSError.

    shared: whether another socket that `share` was called with has the address too.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if shared:
            share(listener)
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise OSError(f"cannot listen on {host} port {port}: {error.strerror}") from None
    return listener


def share(listener: socket.socket) -> None:
    """Let sockets of this user's processes have the same address. The kernel spreads connections over listeners.

    After `bind`, so that the address was not another server's.
    """
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)


def announce(model_name: str, listener: socket.socket) -> None:
    """Say where the server is, once connections wait to be accepted instead of being refused.

    OSError where another server that was started meanwhile has the address.
    """
    try:
        listener.listen(BACKLOG)
    except OSError as error:
        raise OSError(f"cannot listen on {url_of(listener)}: {error.strerror}") from None
    print(f"{model_name} is served on {url_of(listener)}", flush=True)


def url_of(listener: socket.socket) -> str:
    """The address as clients write it."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
