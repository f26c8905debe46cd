"""The listening socket of a server."""

import socket

BACKLOG = 2048  # connections waiting to be accepted


def bind(host: str, port: int, *, shared: bool = False) -> socket.socket:
    """Bind the address before the model is loaded, so a port in use is reported at once. Raises OSError.

    shared: another socket, passed to `share`, is bound to the same address.
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
    """Let other processes of this user bind the same address; the kernel balances connections between them.

    Call it after `bind`, which has checked that no other server uses the address.
    """
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)


def announce(model_name: str, listener: socket.socket) -> None:
    """Listen, then print the server's address.

    OSError if another server has taken the address meanwhile.
    """
    try:
        listener.listen(BACKLOG)
    except OSError as error:
        raise OSError(f"cannot listen on {url_of(listener)}: {error.strerror}") from None
    print(f"{model_name} is served on {url_of(listener)}", flush=True)


def url_of(listener: socket.socket) -> str:
    """The URL of the server."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
