"""JSON as TensorFlow Serving reads and writes it: RapidJSON's dialect, its messages, its layout.

Beyond standard JSON: ``NaN``, ``Infinity`` and ``Inf`` are read; text after the first value is
ignored; repeated keys are all kept.
"""

from __future__ import annotations

import json
import math
import re
from typing import Any

import numpy as np
import rapidjson

from keras_emr_serving.server.status import invalid

MAX_DEPTH = 128  # deeper text is refused: the parser recurses on the stack of its thread
_STRING = re.compile(rb'"(?:[^"\\]++|\\.)*+"?', re.DOTALL)
_NO_BRACKET = bytes(set(range(256)) - set(b"[]{}"))
_AT = re.compile(r"Parse error at offset (\d+): (.*)\.$", re.DOTALL)
_FLOAT_MAX = 3.4028234e38


class Object(list):
    """A JSON object: its (name, value) pairs in order, repeated names included."""

    def find(self, name, default=None):
        """The first value called ``name``."""
        return next((value for key, value in self if key == name), default)

    def __contains__(self, name):
        return any(key == name for key, _ in self)


class _Decoder(rapidjson.Decoder):
    def start_object(self):
        return Object()

    def end_object(self, pairs):
        return pairs


_decoder = _Decoder(number_mode=rapidjson.NM_NAN | rapidjson.NM_NATIVE)


def parse(body: bytes) -> Object:
    """The object in ``body``. Raises ``INVALID_ARGUMENT`` with RapidJSON's words and offset."""
    if not body:
        raise invalid("JSON Parse error: The document is empty")
    _require_shallow(body)
    try:
        text = body.decode()
    except UnicodeDecodeError as error:
        raise _parse_error("Invalid encoding in string.", error.start) from None
    try:
        value = _decoder(text)
    except rapidjson.JSONDecodeError as error:
        offset, problem = _AT.match(str(error)).groups()
        if not problem.startswith("The document root must not be followed"):
            raise _parse_error(problem + ".", offset) from None
        value = _decoder(body[: int(offset)].decode())
    if not isinstance(value, Object):
        raise invalid(f"JSON Value: {dump(value)} Is not object")
    return value


def _parse_error(problem, offset):
    return invalid(f"JSON Parse error: {problem} at offset: {offset}")


def _require_shallow(body):
    if body.count(b"[") + body.count(b"{") <= MAX_DEPTH:
        return
    blank = _STRING.sub(lambda found: b" " * len(found.group()), body)
    if (_depths(blank.translate(None, _NO_BRACKET)) > MAX_DEPTH).any():
        offset = int((_depths(blank) > MAX_DEPTH).argmax())
        raise _parse_error(f"Nested deeper than {MAX_DEPTH} levels.", offset)


def _depths(text):
    """How deep each byte of ``text`` is, every bracket counted."""
    steps = np.zeros(256, np.int8)
    steps[list(b"[{")], steps[list(b"]}")] = 1, -1
    return np.cumsum(steps[np.frombuffer(text, np.uint8)], dtype=np.int64)


def type_name(value: Any) -> str:
    """RapidJSON's name for the type of ``value``."""
    if value is None:
        return "Null"
    if isinstance(value, bool):
        return "True" if value else "False"
    if isinstance(value, Object):
        return "Object"
    if isinstance(value, list):
        return "Array"
    return "String" if isinstance(value, str) else "Number"


def decimal(value: Any, digits: int = 9) -> str:
    """A float as the server writes it: six digits if they are exact, else all ``digits``.

    Args:
        value: a float32 (``digits`` 9) or float64 (``digits`` 17), NumPy's or Python's.
    """
    if not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    value = float(value)
    text = f"{value:g}"
    back = float(text)
    if (_as_float32(back) if digits == 9 else back) != value:
        text = f"{value:.{digits}g}"
    return text if "." in text or "e" in text else text + ".0"


def _as_float32(value):
    with np.errstate(over="ignore"):
        return float(np.float32(value))


def quote(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


class _Unwritable(Exception):
    """RapidJSON's writer stops at a NaN or infinity, and what is written so far stays."""


def dump(value: Any) -> str:
    """``value`` as error messages quote it: four spaces, each array on one line."""
    if isinstance(value, float):
        single = -_FLOAT_MAX <= value <= _FLOAT_MAX
        return decimal(np.float32(value)) if single else decimal(value, 17)
    parts: list[str] = []
    try:
        _dump(value, 0, parts)
    except _Unwritable:
        pass
    return "".join(parts)


def _dump(value, level, parts):
    if isinstance(value, Object):
        indent = "\n" + "    " * (level + 1)
        for i, (name, item) in enumerate(value):
            parts.append(f"{',' if i else '{'}{indent}{quote(name)}: ")
            _dump(item, level + 1, parts)
        parts.append("\n" + "    " * level + "}" if value else "{}")
    elif isinstance(value, list):
        parts.append("[")
        for i, item in enumerate(value):
            parts.append(", " if i else "")
            _dump(item, level + 1, parts)
        parts.append("]")
    elif isinstance(value, float):
        if not math.isfinite(value):
            raise _Unwritable
        parts.append(_shortest(value))
    elif isinstance(value, str):
        parts.append(quote(value))
    else:
        parts.append(json.dumps(value))


def _shortest(value):
    """The shortest digits that read back as ``value``, laid out as RapidJSON does."""
    sign = "-" if math.copysign(1.0, value) < 0 else ""
    if value == 0:
        return sign + "0.0"
    mantissa, exponent = f"{abs(value)!r}e0".split("e")[:2]
    whole, _, fraction = mantissa.partition(".")
    digits = (whole + fraction).lstrip("0")
    point = len(whole) + int(exponent) if whole != "0" else len(digits) - len(fraction)
    digits = digits.rstrip("0")
    if len(digits) <= point <= 21:
        text = digits.ljust(point, "0") + ".0"
    elif 0 < point <= 21:
        text = f"{digits[:point]}.{digits[point:]}"
    elif -6 < point <= 0:
        text = "0." + "0" * -point + digits
    else:
        text = f"{digits[0]}{'.' if digits[1:] else ''}{digits[1:]}e{point - 1}"
    return sign + text
