"""Requests over REST: JSON to arrays and to ``tf.train.Example``."""

from __future__ import annotations

import base64
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import numpy as np

from keras_emr_serving.server.json_text import Object, dump, parse, type_name
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


@dataclass
class PredictRequest:
    """``inputs``: name -> array. ``row``: whether it came as ``instances``."""

    signature_name: str
    inputs: dict[str, np.ndarray]
    row: bool


@dataclass
class _Values:
    """One input while it is being read: values in order, and the shape that each item must have."""

    flat: list = field(default_factory=list)
    shape: list[int] | None = None
    size: int = 0


def signature_of(document: Object) -> str:
    """The request's signature name, ``""`` if it gives none."""
    if "signature_name" not in document:
        return ""
    name = document.find("signature_name")
    if not isinstance(name, str):
        raise invalid(
            f"JSON Value: {dump(document)} not formatted correctly. 'signature_name' key must be "
            "a string value."
        )
    return name


def read_predict(body: bytes, input_types: Callable[[str], Mapping[str, str]]) -> PredictRequest:
    """A predict request.

    Args:
        body: JSON text, either ``instances`` (a list with one item per row) or ``inputs``.
        input_types: from the signature's name to the type (``"float"``, ``"string"``, ...) of each
            input; it raises for an unknown model or signature.

    Raises:
        ServingError: ``INVALID_ARGUMENT`` with TF Serving's text, or what ``input_types`` raises.
    """
    document = parse(body)
    signature = signature_of(document)
    types = input_types(signature)
    if not types:
        raise invalid(f"Failed to get input map for signature: {signature or 'DEFAULT'}")
    if "instances" in document:
        if "inputs" in document:
            raise invalid(
                f"JSON Value: {dump(document)} Not formatted correctly expecting only one of "
                "'inputs' or 'instances' keys to exist "
            )
        instances = document.find("instances")
        if type_name(instances) != "Array":
            raise invalid(f"JSON Value: {dump(document)} Expecting 'instances' to be an list/array")
        if not instances:
            raise invalid(f"JSON Value: {dump(document)} No values in 'instances' array")
        return PredictRequest(signature, _rows(instances, types), True)
    if "inputs" in document:
        return PredictRequest(signature, _columns(document.find("inputs"), types), False)
    raise invalid("Missing 'inputs' or 'instances' key")


def _columns(value, types):
    if not isinstance(value, Object) or _is_base64(value):
        if len(types) > 1:
            raise invalid(
                "inputs is a plain value/list, but expecting an object as multiple input tensors "
                "required as per tensorinfo_map"
            )
        value = Object([(next(iter(types)), value)])
    inputs = {}
    for name in sorted(types):
        if name not in value:
            raise invalid(f"Missing named input: {name} in 'inputs' object.")
        item = value.find(name)
        shape = _shape(item)
        flat = []
        _fill(item, 0, shape, types[name], flat)
        inputs[name] = _array(flat, shape, types[name])
    return inputs


def _rows(instances, types):
    first = instances[0]
    if not isinstance(first, Object) and len(types) > 1:
        raise invalid(
            "instances is a plain list, but expecting list of objects as multiple input tensors "
            "required as per tensorinfo_map"
        )
    named = isinstance(first, Object) and not _is_base64(first)
    only = next(iter(types))
    inputs = {name: _Values() for name in types}
    for i, item in enumerate(instances):
        is_object = isinstance(item, Object) and not _is_base64(item)
        if named and not is_object:
            raise invalid(f"Expecting object but got list at item {i} of input list")
        if is_object and not named:
            raise invalid(f"Expecting value/list but got object at item {i} of input list")
        for name, value in item if named else [(only, item)]:
            try:
                _add(value, name, types, inputs)
            except ServingError as error:
                key = f" key: {name}" if named else ""
                raise invalid(
                    f"Failed to process element: {i}{key} of 'instances' list. Error: {error}"
                ) from None
        if named and {name for name, _ in item} != set(types):
            raise invalid(
                f"Failed to process element: {i} of 'instances' list. JSON object: {dump(item)} "
                f"keys must be equal to: {','.join(sorted(types))}"
            )
    return {
        name: _array(values.flat, [len(instances), *values.shape], types[name])
        for name, values in inputs.items()
    }


def _add(item, name, types, inputs):
    if name not in types:
        raise invalid(f"JSON object: does not have named input: {name}")
    values = inputs[name]
    shape = _shape(item)
    before = len(values.flat)
    _fill(item, 0, shape, types[name], values.flat)
    size = len(values.flat) - before
    if values.shape is None:
        values.shape, values.size = shape, size
    elif values.size != size:
        raise invalid(f"Expecting tensor size: {values.size} but got: {size}")
    elif values.shape != shape:
        raise invalid(f"Expecting shape {_text(values.shape)} but got: {_text(shape)}")


def _text(shape):
    return f"[{','.join(map(str, shape))}]"


def _shape(value):
    """Lengths along the first elements, as far as there are lists."""
    shape = []
    while type(value) is list:
        shape.append(len(value))
        if not value:
            break
        value = value[0]
    return shape


def _fill(value, level, shape, dtype, flat):
    """Append the leaves of ``value`` to ``flat``; every list must fit ``shape``."""
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
        _fill(item, level + 1, shape, dtype, flat)


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


def _array(flat, shape, dtype):
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


def _is_base64(value):
    return isinstance(value, Object) and len(value) == 1 and isinstance(value.find("b64"), str)


def decode_base64(value: Any) -> bytes:
    """The bytes of ``{"b64": text}``; padding may be left out, white space is skipped."""
    if not _is_base64(value):
        raise invalid(f"JSON Value: {dump(value)} not formatted correctly for base64 data")
    found = _BASE64.fullmatch(_SPACE.sub("", value.find("b64")))
    if not found:
        raise invalid("Unable to base64 decode")
    digits, padding = found.groups()
    missing = -len(digits) % 4
    if missing == 3 or len(padding) not in (0, missing):
        raise invalid("Unable to base64 decode")
    return base64.b64decode(digits + "=" * missing)
