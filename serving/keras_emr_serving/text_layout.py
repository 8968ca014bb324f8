"""Where the fields of a text proto stand, so that one can be changed and all else kept."""

from __future__ import annotations

import re

_TOKEN = re.compile(
    r"""\s+ | \#[^\n]* | "(?:\\.|[^"\\\n])*" | '(?:\\.|[^'\\\n])*' | [\w.+/-]+ | .""",
    re.VERBOSE | re.DOTALL,
)
_CLOSING = {"{": "}", "<": ">", "[": "]"}


def named(text, start, end, name):
    """(begin, begin of the value, end) of the fields called ``name``."""
    return [field[1:] for field in fields(text, start, end) if field[0] == name]


def comments_in(text):
    """The comments in a piece of a text proto, each from its ``#`` to the end of its line."""
    tokens = (found.group() for found in _TOKEN.finditer(text))
    return [token.rstrip() for token in tokens if token.startswith("#")]


def fields(text, start, end):
    """(name, begin, begin of the value, end) of the fields in a piece of a text proto.

    The text has been parsed before: only its layout is of interest here.
    """
    tokens = [
        (found.group(), found.start(), found.end())
        for found in _TOKEN.finditer(text, start, end)
        if not found.group().isspace() and not found.group().startswith("#")
    ]
    found, i = [], 0
    while i < len(tokens):
        word, first, last = tokens[i]
        if word in ";,":
            i += 1
            continue
        i = _after(tokens, i)  # a name, or [an.extension]
        if i < len(tokens) and tokens[i][0] == ":":
            i += 1
        if i >= len(tokens):
            found.append((word, first, last, last))
            break
        value = tokens[i][1]
        quoted = tokens[i][0][0] in "\"'"
        i = _after(tokens, i)
        while quoted and i < len(tokens) and tokens[i][0][0] in "\"'":
            i += 1  # strings side by side are one
        last = tokens[i - 1][2]
        if i < len(tokens) and tokens[i][0] in ";,":
            last = tokens[i][2] if tokens[i - 1][0] not in "}>]" else last
            i += 1
        found.append((word, first, value, last))
    return found


def _after(tokens, i):
    """The token after the one at ``i``, or after the bracket that it opens."""
    opened = tokens[i][0]
    if opened not in _CLOSING:
        return i + 1
    depth, closing = 0, _CLOSING[opened]
    while i < len(tokens):
        depth += (tokens[i][0] == opened) - (tokens[i][0] == closing)
        i += 1
        if depth == 0:
            break
    return i
