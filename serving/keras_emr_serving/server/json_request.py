"""Predict requests over REST: JSON to named arrays."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

from keras_emr_serving.server.json_text import Object, dump, parse, type_name
from keras_emr_serving.server.json_values import fill, is_base64, shape_of, to_array
from keras_emr_serving.server.status import ServingError, invalid


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
    if not isinstance(value, Object) or is_base64(value):
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
        shape = shape_of(item)
        flat = []
        fill(item, 0, shape, types[name], flat)
        inputs[name] = to_array(flat, shape, types[name])
    return inputs


def _rows(instances, types):
    first = instances[0]
    if not isinstance(first, Object) and len(types) > 1:
        raise invalid(
            "instances is a plain list, but expecting list of objects as multiple input tensors "
            "required as per tensorinfo_map"
        )
    named = isinstance(first, Object) and not is_base64(first)
    only = next(iter(types))
    inputs = {name: _Values() for name in types}
    for i, item in enumerate(instances):
        is_object = isinstance(item, Object) and not is_base64(item)
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
        name: to_array(values.flat, [len(instances), *values.shape], types[name])
        for name, values in inputs.items()
    }


def _add(item, name, types, inputs):
    if name not in types:
        raise invalid(f"JSON object: does not have named input: {name}")
    values = inputs[name]
    shape = shape_of(item)
    before = len(values.flat)
    fill(item, 0, shape, types[name], values.flat)
    size = len(values.flat) - before
    if values.shape is None:
        values.shape, values.size = shape, size
    elif values.size != size:
        raise invalid(f"Expecting tensor size: {values.size} but got: {size}")
    elif values.shape != shape:
        raise invalid(f"Expecting shape {_text(values.shape)} but got: {_text(shape)}")


def _text(shape):
    return f"[{','.join(map(str, shape))}]"
