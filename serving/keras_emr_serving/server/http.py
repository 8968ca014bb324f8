"""HTTP connections that cannot be held open by doing nothing."""

from __future__ import annotations

from uvicorn.protocols.http.h11_impl import H11Protocol


class BoundedProtocol(H11Protocol):
    """Uvicorn's protocol, and two bounds that it lacks.

    A client has ``timeout`` seconds to send the head of a request, however slowly it comes, and as
    many to read an answer that is waiting for it when the connection is to be closed.
    """

    timeout = 30.0
    _head_timer = None

    @classmethod
    def with_timeout(cls, seconds: float) -> type[BoundedProtocol]:
        return type("BoundedProtocol", (cls,), {"timeout": seconds})

    def connection_made(self, transport):
        super().connection_made(transport)
        self._watch_head()

    def data_received(self, data):
        super().data_received(data)
        self._watch_head()

    def on_response_complete(self):
        super().on_response_complete()
        self._watch_head()

    def connection_lost(self, exc):
        self._end_timer()
        super().connection_lost(exc)

    def timeout_keep_alive_handler(self):
        super().timeout_keep_alive_handler()
        # Closing waits for what is written to be read.
        self.loop.call_later(self.timeout, self.transport.abort)

    def _watch_head(self):
        if self.cycle is not None and not self.cycle.response_complete:
            self._end_timer()  # a request is under way, which the application bounds
        elif self._head_timer is None:
            self._head_timer = self.loop.call_later(self.timeout, self.transport.abort)

    def _end_timer(self):
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None
