"""Errors that a user can mend: one line each, shown without a traceback."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """A mistake in what the user gave: a bad value, file or data set.

    The message is one line: what is wrong, ``Received: ...``, then what was expected or the fix.
    """


class NotWritten(OSError):
    """A file could not be written, as on a full disk; the message is one line that names it."""


def unknown(kind: str, name: str, known: Iterable[str]) -> UserError:
    """The error for a name that is not among ``known``, with a suggestion when one is close.

    Args:
        kind: what is being named, e.g. ``"attack"``.
        name: what the user wrote.
        known: the names that would have worked, in the order to show them.

    Returns:
        The error, to be raised by the caller.
    """
    known = list(known)
    by_lower_case = {option.lower(): option for option in known}
    close = difflib.get_close_matches(str(name).lower(), list(by_lower_case), n=1)
    hint = f" (did you mean {by_lower_case[close[0]]!r}?)" if close else ""
    return UserError(
        f"unknown {kind}. Received: {name!r}. Expected one of: {', '.join(known)}{hint}"
    )
