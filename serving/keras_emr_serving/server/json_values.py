"""JSON values to arrays: regular lists of numbers, strings and base64, by TensorFlow's types."""

from __future__ import annotations

import base64
import math
import re
from itertools import chain
from typing import Any

import numpy as np

from keras_emr_serving.server.json_text import Object, dump, type_name
from keras_emr_serving.server.status import ServingError, invalid

MAX_RANK = 64  # NumPy's
_BASE64 = re.compile(r"([A-Za-z0-9+/]*)([=.]*)")
_SPACE = re.compile(r"[ \t\n\v\f\r]+")
# TensorFlow's name of a type -> NumPy's, and the integers that JSON may give for it.
_INT32 = (-(2**31), 2**31 - 1)
_INTEGERS = {
    "int8": _INT32,
    "int16": _INT32,
    "int32": _INT32,
    "uint8": _INT32,
    "int64": (-(2**63), 2**63 - 1),
    "uint32": (0, 2**32 - 1),
    "uint64": (0, 2**64 - 1),
}
# name -> NumPy type, largest exact integer, largest value
_FLOATS = {
    "float": (np.float32, 2**24 - 1, float(np.finfo(np.float32).max)),
    "double": (np.float64, 2**53 - 1, math.inf),
}


def shape_of(value: Any) -> list[int]:
    """Lengths along the first elements, as far as there are lists."""
    shape = []
    while type(value) is list:
        shape.append(len(value))
        if not value:
            break
        value = value[0]
    return shape


def fill(value: Any, level: int, shape: list[int], dtype: str, flat: list) -> None:
    """Append the leaves of ``value`` to ``flat``, in order.

    Args:
        value: a JSON value, ``level`` lists deep.
        shape: what :func:`shape_of` says of the outermost value; every list must fit it.
        dtype: TensorFlow's name of a type, such as ``"float"`` or ``"int64"``.

    Raises:
        ServingError: ``INVALID_ARGUMENT`` for a list or a leaf that does not fit.
    """
    if type(value) is not list:
        if level != len(shape):
            raise invalid(
                f"JSON Value: {dump(value)} found at incorrect level: {level + 1} in the JSON DOM. "
                f"Expected at level: {len(shape)}"
            )
        flat.append(_leaf(value, dtype))
        return
    if level >= len(shape):
        raise invalid(f"Encountered list at unexpected level: {level} expected < {len(shape)}")
    if level == 0 and _fill_at_once(value, shape, dtype, flat):
        return
    if len(value) != shape[level]:
        raise invalid(
            f"Encountered list at unexpected size: {len(value)} at level: {level} expected size: "
            f"{shape[level]}"
        )
    for item in value:
        fill(item, level + 1, shape, dtype, flat)


def _fill_at_once(value, shape, dtype, flat):
    """The usual request, regular and all numbers, without a call per number; False: look closer."""
    if dtype not in _FLOATS:
        return False
    items = value
    for size in shape[1:]:
        if set(map(type, items)) != {list} or set(map(len, items)) != {size}:
            return False
        items = list(chain.from_iterable(items))
    kinds = set(map(type, items))
    if not items or not kinds <= {float, int}:
        return False
    _, exact, largest = _FLOATS[dtype]
    low, high = min(items), max(items)
    if not (-largest <= low and high <= largest) or any(map(math.isnan, items)):
        return False
    if int in kinds and not (-exact <= low and high <= exact):
        return False
    flat.extend(items)
    return True


def _leaf(value, dtype):
    if dtype == "string" and isinstance(value, Object):
        return decode_base64(value)
    if isinstance(value, Object):
        raise _type_error(value, dtype)
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if dtype in _FLOATS:
        if not number:
            raise _type_error(value, dtype)
        _require_exact(value, dtype)
    elif dtype in _INTEGERS:
        low, high = _INTEGERS[dtype]
        if not number or isinstance(value, float) or not low <= value <= high:
            raise _type_error(value, dtype)
    elif dtype == "string":
        if not isinstance(value, str):
            raise _type_error(value, dtype)
        return value.encode(errors="surrogatepass")
    elif dtype == "bool":
        if not isinstance(value, bool):
            raise _type_error(value, dtype)
    else:
        raise ServingError(
            "UNIMPLEMENTED", f"Conversion of JSON Value: {dump(value)} to type: {dtype}"
        )
    return value


def _require_exact(value, dtype):
    _, exact, largest = _FLOATS[dtype]
    if not math.isfinite(value):
        return
    if abs(value) > (exact if isinstance(value, int) else largest):
        raise invalid(
            f"Cannot convert JSON value: {dump(value)} to {dtype} without loss of precision."
        )


def _type_error(value, dtype):
    return invalid(
        f"JSON Value: {dump(value)} Type: {type_name(value)} is not of expected type: {dtype}"
    )


def to_array(flat: list, shape: list[int], dtype: str) -> np.ndarray:
    """The leaves as an array of ``shape``. Raises ``INVALID_ARGUMENT`` for too high a rank."""
    if len(shape) > MAX_RANK:
        raise invalid(f"Tensor of rank {len(shape)}, but at most {MAX_RANK} is supported")
    flat = flat[: math.prod(shape)]  # a repeated name gave more: the first values count
    if dtype in _FLOATS:
        return np.array(flat, _FLOATS[dtype][0]).reshape(shape)
    if dtype == "string":
        array = np.empty(len(flat), object)
        array[:] = flat
        return array.reshape(shape)
    if dtype == "bool":
        return np.array(flat, bool).reshape(shape)
    wide = np.uint64 if dtype == "uint64" else np.int64
    return np.array(flat, wide).astype(dtype).reshape(shape)  # a small type wraps around


def is_base64(value: Any) -> bool:
    """Whether ``value`` is ``{"b64": text}`` and nothing else."""
    return isinstance(value, Object) and len(value) == 1 and isinstance(value.find("b64"), str)


def decode_base64(value: Any) -> bytes:
    """The bytes of ``{"b64": text}``; padding may be left out, white space is skipped."""
    if not is_base64(value):
        raise invalid(f"JSON Value: {dump(value)} not formatted correctly for base64 data")
    found = _BASE64.fullmatch(_SPACE.sub("", value.find("b64")))
    if not found:
        raise invalid("Unable to base64 decode")
    digits, padding = found.groups()
    missing = -len(digits) % 4
    if missing == 3 or len(padding) not in (0, missing):
        raise invalid("Unable to base64 decode")
    return base64.b64decode(digits + "=" * missing)
