"""What goes wrong between a client and a server: one class."""

from __future__ import annotations

# No answer, or one that says to come back later: asking again can help.
_LATER = {429, 503, "RESOURCE_EXHAUSTED", "UNAVAILABLE"}
# The server, or what stands before it, was too slow or away.
_AWAY = {502, 504, "DEADLINE_EXCEEDED"}
_MISTAKE = {
    *("INVALID_ARGUMENT", "FAILED_PRECONDITION", "OUT_OF_RANGE", "NOT_FOUND", "UNAUTHENTICATED"),
    *("PERMISSION_DENIED", "UNIMPLEMENTED"),
}


class ClientError(Exception):
    """A request that was not answered, or answered with an error.

    Attributes:
        status: HTTP status (int), name of the gRPC code (str), or ``None`` without an answer.
        message: one line: the server's own text where there is one.
        url: what was asked.
        retryable: whether the same request may be sent again at once, after a pause.
        retry_after: seconds that the server asked to wait, or ``None``.
    """

    def __init__(self, status, message, url, *, retryable=None, retry_after=None):
        self.status, self.url = status, url
        self.message = " ".join(str(message).split())
        self.retryable = status in _LATER if retryable is None else retryable
        self.retry_after = retry_after
        told = "no answer" if status is None else f"the server answered {status}"
        super().__init__(f"{told}: {self.message} Asked: {url}")

    @property
    def temporary(self) -> bool:
        """Whether the server is away, busy or too slow, rather than unwilling."""
        return self.retryable or self.status in _AWAY or self.timed_out

    @property
    def timed_out(self) -> bool:
        """Whether the time for an answer ran out here."""
        return isinstance(self, _TimedOut)

    @property
    def mistake(self) -> bool:
        """Whether the server says that the request is wrong: the address, the model, the images."""
        if isinstance(self.status, int):
            return 400 <= self.status < 500 and self.status not in (408, 429, 499)
        return self.status in _MISTAKE


class _TimedOut(ClientError):
    pass


def timed_out(seconds, url) -> ClientError:
    """The error of a server that took too long over an answer."""
    return _TimedOut(None, f"none within {seconds:g} s.", url, retryable=False)
