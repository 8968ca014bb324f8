"""Taking a port."""

from __future__ import annotations

import errno
import socket


class CannotListen(OSError):
    """A port that cannot be had. ``api``: ``"REST"`` or ``"gRPC"``; ``host``: whether it is the
    host that is at fault."""

    def __init__(self, api: str, address: str, reason: str, host: bool = False):
        super().__init__(f"{api}: cannot listen on {address}: {reason}")
        self.api, self.address, self.reason, self.host = api, address, reason, host


def bind(host: str, port: int) -> socket.socket:
    """A listening socket for REST. Raises :class:`CannotListen`."""
    bound = _bind("REST", host, port)
    try:
        bound.listen(1024)
    except OSError as error:  # another process has the same port and listens already
        bound.close()
        raise CannotListen("REST", f"{host}:{port}", error.strerror) from None
    return bound


def require_free(api: str, host: str, port: int) -> None:
    """Raises :class:`CannotListen`, with the system's reason, unless the port can be had now.

    gRPC's own attempt gives no reason, but lines of its C core on stderr.
    """
    _bind(api, host, port).close()


def _bind(api, host, port):
    try:
        # With the protocol given: asyncio leaves Nagle's algorithm on for sockets without, and
        # every answer would wait for the client's delayed acknowledgement (40 ms).
        family, kind, protocol, *_ = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, kind, protocol or socket.IPPROTO_TCP)
        try:
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            bound.bind((host, port))
        except BaseException:
            bound.close()
            raise
    except (OSError, UnicodeError) as error:  # UnicodeError: a name that cannot be one of a host
        reason = getattr(error, "strerror", None) or "not a host name"
        named = isinstance(error, (UnicodeError, socket.gaierror))
        foreign = named or error.errno == errno.EADDRNOTAVAIL
        raise CannotListen(api, f"{host}:{port}", reason, foreign) from None
    return bound
