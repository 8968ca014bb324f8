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
# What would have been right, by status or by what kind of error it is.
_NOT_THERE = "a model, version or label that is served there"
_NOT_ALLOWED = "a request that is allowed there: see the certificate, or the headers"
_EXPECTED = {
    **dict.fromkeys((404, "NOT_FOUND"), _NOT_THERE),
    **dict.fromkeys((401, 403, "UNAUTHENTICATED", "PERMISSION_DENIED"), _NOT_ALLOWED),
}
_OTHERWISE = {
    "mistake": "what the model takes, and a label that it has",
    "away": "a server that listens there and speaks this protocol",
    "later": "a server with time for this: ask again later",
    "trouble": "an answer: the server's log may say more",
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

    def __init__(self, status, message, url, *, retryable=None, retry_after=None, expected=None):
        self.status, self.url = status, url
        self.message = _one_line(message)
        self.retryable = status in _LATER if retryable is None else retryable
        self.retry_after = retry_after
        told = "no answer" if status is None else f"the server answered {status}"
        expected = expected or _EXPECTED.get(status) or _OTHERWISE[self._kind]
        end = "" if self.message.endswith((".", "!", "?")) else "."
        super().__init__(f"{told}: {self.message}{end} Received: {url}. Expected {expected}.")

    @property
    def _kind(self):
        if self.mistake:
            return "mistake"
        return "away" if self.status is None else "later" if self.retryable else "trouble"

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
    expected = "one in time: give it longer, or fewer images at once"
    return _TimedOut(None, f"none within {seconds:g} s.", url, retryable=False, expected=expected)


def _one_line(text):
    """``text`` without line ends, nor what a terminal would take for a command."""
    return " ".join("".join(c if c.isprintable() else " " for c in str(text)).split())
