"""Status codes of TensorFlow Serving, and what they become over HTTP."""

from __future__ import annotations

# name -> (canonical number, HTTP status)
CODES = {
    "OK": (0, 200),
    "CANCELLED": (1, 499),
    "UNKNOWN": (2, 500),
    "INVALID_ARGUMENT": (3, 400),
    "DEADLINE_EXCEEDED": (4, 504),
    "NOT_FOUND": (5, 404),
    "ALREADY_EXISTS": (6, 409),
    "PERMISSION_DENIED": (7, 403),
    "RESOURCE_EXHAUSTED": (8, 429),
    "FAILED_PRECONDITION": (9, 400),
    "ABORTED": (10, 409),
    "OUT_OF_RANGE": (11, 400),
    "UNIMPLEMENTED": (12, 501),
    "INTERNAL": (13, 500),
    "UNAVAILABLE": (14, 503),
    "DATA_LOSS": (15, 500),
    "UNAUTHENTICATED": (16, 401),
}
_BY_NUMBER = {number: name for name, (number, _) in CODES.items()}


class ServingError(Exception):
    """A request that failed: ``code`` is one of :data:`CODES`, ``message`` goes to the client."""

    def __init__(self, code: str, message: str):
        super().__init__(message)
        self.code, self.message = code, message

    @property
    def number(self) -> int:
        return CODES[self.code][0]

    @property
    def http_status(self) -> int:
        return CODES[self.code][1]

    def __str__(self):
        return f"{self.code}: {self.message}"


def invalid(message: str) -> ServingError:
    """``INVALID_ARGUMENT``: the client's mistake."""
    return ServingError("INVALID_ARGUMENT", message)


def from_exception(error: Exception) -> ServingError:
    """What a failure inside TensorFlow, or a bug of ours, is for the client."""
    if isinstance(error, ServingError):
        return error
    number = getattr(error, "error_code", None)  # tf.errors.OpError
    if number in _BY_NUMBER:
        return ServingError(_BY_NUMBER[number], error.message)
    if isinstance(error, UnicodeDecodeError):
        # TensorFlow's own error, whose text quotes bytes of the request that are no UTF-8.
        return invalid(bytes(error.object).decode(errors="replace"))
    return ServingError("INTERNAL", f"{type(error).__name__}: {error}")
