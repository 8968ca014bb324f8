"""Taking a port."""

from __future__ import annotations

import socket


class CannotListen(OSError):
    """A port that cannot be had. ``api``: ``"REST"`` or ``"gRPC"``."""

    def __init__(self, api: str, address: str, reason: str):
        super().__init__(f"{api}: cannot listen on {address}: {reason}")
        self.api, self.address, self.reason = api, address, reason


def bind(host: str, port: int) -> socket.socket:
    """A listening socket. Raises :class:`CannotListen`."""
    try:
        # With the protocol given: asyncio leaves Nagle's algorithm on for sockets without, and
        # every answer would wait for the client's delayed acknowledgement (40 ms).
        family, kind, protocol, *_ = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, kind, protocol or socket.IPPROTO_TCP)
        try:
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            bound.bind((host, port))
            bound.listen(1024)
        except BaseException:
            bound.close()
            raise
    except OSError as error:
        raise CannotListen("REST", f"{host}:{port}", error.strerror) from None
    return bound
