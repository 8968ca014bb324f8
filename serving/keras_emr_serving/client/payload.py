"""Requests and answers of the REST API as JSON, quick enough for batches of images."""

from __future__ import annotations

import base64
import json
from functools import lru_cache

import numpy as np


def request_body(signature, inputs) -> bytes:
    """The body of a predict request in column format.

    Args:
        signature: name.
        inputs: name -> array, or list of ``bytes``, with the batch first.
    """
    parts = [f"{json.dumps(name)}: {_values(value)}" for name, value in inputs.items()]
    text = f'{{"signature_name": {json.dumps(signature)}, "inputs": {{{", ".join(parts)}}}}}'
    return text.encode()


def _values(value):
    if isinstance(value, np.ndarray) and value.dtype == np.float32 and value.ndim > 1:
        template = _template(value.shape[1:])
        rows = (template % tuple(row.ravel().tolist()) for row in value)
        # JSON has no numbers that are not finite; the server reads these words.
        text = f"[{','.join(rows)}]"
        if np.isfinite(value).all():
            return text
        return text.replace("nan", "NaN").replace("inf", "Infinity")
    return json.dumps(
        value.tolist() if isinstance(value, np.ndarray) else list(value), default=_b64
    )


def _b64(value):
    return {"b64": base64.b64encode(value).decode("ascii")}


@lru_cache(maxsize=8)
def _template(shape):
    """Text with a place for each number of an array; nine digits give a float32 back exactly."""
    text = "%.9g"
    for side in reversed(shape):
        text = f"[{','.join([text] * side)}]"
    return text


def read_outputs(text, signature) -> dict[str, np.ndarray]:
    """Arrays by name from the answer to :func:`request_body`.

    Args:
        text: bytes; NaN and Infinity may stand in it as TensorFlow Serving writes them.
        signature: :class:`Signature`, for names and types.

    Raises:
        ValueError, KeyError, TypeError: it is not such an answer.
    """
    outputs = json.loads(text)["outputs"]
    # A single output comes without its name.
    if len(signature.outputs) == 1:
        outputs = dict.fromkeys(signature.outputs, outputs)
    return {
        name: _array(name, outputs[name], tensor.numpy)
        for name, tensor in signature.outputs.items()
    }


def _array(name, values, dtype):
    if dtype is np.object_ and name.endswith("_bytes"):
        values = [base64.b64decode(value["b64"]) for value in values]
    array = np.asarray(values, dtype)
    if array.dtype == object and dtype is not np.object_:
        raise ValueError(f"{name} is ragged")
    return array
