"""Reading the bodies of REST requests within bounds: of one, and of all together."""

from __future__ import annotations

import asyncio
import zlib

from starlette.requests import ClientDisconnect, Request

from keras_emr_serving.server.status import ServingError, invalid

_PIECE = 1 << 20  # unpacked at a time, so that other requests get their turn
_DRAIN_SECONDS = 5.0


class Waiting:
    """Places and memory of the requests under way. For the event loop's thread alone."""

    def __init__(self, max_requests: int, max_bytes: int):
        self.requests, self.max_requests = 0, max_requests
        self.bytes, self.max_bytes = 0, max_bytes

    def enter(self) -> Place:
        """A place for one request. Raises ``UNAVAILABLE``."""
        if self.requests >= self.max_requests:
            raise ServingError("UNAVAILABLE", "Too many requests are waiting")
        self.requests += 1
        return Place(self)


class Place:
    """One request's share of :class:`Waiting`, until :meth:`leave`."""

    def __init__(self, waiting: Waiting):
        self._waiting, self._bytes = waiting, 0

    def reserve(self, size: int) -> None:
        """Have room for ``size`` bytes in all. Raises ``UNAVAILABLE``."""
        more = size - self._bytes
        if more <= 0:
            return
        if self._waiting.bytes + more > self._waiting.max_bytes:
            raise ServingError("UNAVAILABLE", "Too many bytes of requests are waiting")
        self._waiting.bytes += more
        self._bytes = size

    def leave(self) -> None:
        self._waiting.requests -= 1
        self._waiting.bytes -= self._bytes


async def read_body(request: Request, place: Place, limit: int) -> bytes:
    """The request's body, unpacked if it is gzip.

    Raises:
        ServingError: more than ``limit`` bytes, packed or unpacked, or no gzip
            (``INVALID_ARGUMENT``); no room for it beside the others (``UNAVAILABLE``).
    """
    encoding = request.headers.get("content-encoding", "identity").strip().lower()
    length = request.headers.get("content-length", "")
    if length.isdigit():  # h11 has seen to it that it is a number of at most twenty digits
        _require(int(length), limit)
        place.reserve(int(length))
    unpack = _Gzip() if encoding == "gzip" else None
    parts, packed, size = [], 0, 0
    async for chunk in request.stream():
        packed += len(chunk)
        _require(packed, limit)
        async for piece in _pieces(chunk) if unpack is None else unpack.pieces(chunk):
            size += len(piece)
            _require(size, limit)
            place.reserve(size)
            parts.append(piece)
    if unpack is not None and packed and not unpack.complete:
        raise _not_gzip("it is incomplete")
    return b"".join(parts)


async def drain(request: Request, limit: int) -> None:
    """Read and forget what the client still sends, within bounds: one that is answered and cut off
    in the middle of its body sees a broken connection instead of the answer."""
    if "expect" in request.headers:  # it waits for a word before it sends its body
        return
    try:
        async with asyncio.timeout(_DRAIN_SECONDS):
            async for chunk in request.stream():
                limit -= len(chunk)
                if limit < 0:
                    return
    except (RuntimeError, ClientDisconnect, TimeoutError):
        pass  # RuntimeError: all of it had been read


def _require(size, limit):
    if size > limit:
        raise invalid(f"Request body is larger than {limit} bytes")


async def _pieces(chunk):
    yield chunk


class _Gzip:
    def __init__(self):
        self._inflate = zlib.decompressobj(wbits=31)

    @property
    def complete(self):
        return self._inflate.eof

    async def pieces(self, chunk):
        while chunk:
            if self.complete:
                raise _not_gzip("there is more after its end")
            try:
                piece = self._inflate.decompress(chunk, _PIECE)
            except zlib.error as error:
                raise _not_gzip(error) from None
            chunk = self._inflate.unused_data or self._inflate.unconsumed_tail
            yield piece
            if chunk:
                await asyncio.sleep(0)


def _not_gzip(problem):
    return invalid(f"Failed to decompress the gzip request body: {problem}")
