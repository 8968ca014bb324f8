"""Classify and regress requests over REST: JSON to ``tf.train.Example``."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from keras_emr_serving.server.json_request import signature_of
from keras_emr_serving.server.json_text import Object, dump, parse, type_name
from keras_emr_serving.server.json_values import decode_base64, is_base64
from keras_emr_serving.server.status import invalid

_MAX_FLOAT = float(np.finfo(np.float32).max)
_KINDS = {"bytes_list": "bytes", "float_list": "float", "int64_list": "int64"}


@dataclass
class ExamplesRequest:
    """``examples``: serialized ``tf.train.Example``, the context's features put before each."""

    signature_name: str
    examples: list[bytes]


def read_examples(body: bytes) -> ExamplesRequest:
    """A classify or regress request: ``examples`` and perhaps a ``context`` for all of them.

    Raises:
        ServingError: ``INVALID_ARGUMENT`` with TF Serving's text (its words name classify for
            both kinds of request).
    """
    document = parse(body)
    signature = signature_of(document)
    context = b""
    if "context" in document:
        context = _example(document.find("context"))
    if "examples" not in document:
        raise _malformed(
            document, "When method is classify, key 'examples' is expected and was not found"
        )
    examples = document.find("examples")
    if type_name(examples) != "Array":
        raise _malformed(document, "Expecting 'examples' value to be an list/array")
    if not examples:
        raise _malformed(document, "'examples' value is an empty array")
    # Two serialized messages in a row are one message with the fields of both.
    return ExamplesRequest(signature, [context + _example(one) for one in examples])


def _malformed(document, problem):
    return invalid(f"JSON Value: {dump(document)} {problem}")


def _example(value):
    from tensorflow.core.example.example_pb2 import Example
    from tensorflow.core.example.feature_pb2 import Feature

    if not isinstance(value, Object):
        raise invalid(f"Example must be JSON object but got JSON {type_name(value)}")
    example = Example()
    for name, content in value:
        feature = Feature()
        for one in content if type_name(content) == "Array" else [content]:
            _append(feature, name, one)
        example.features.feature[name].CopyFrom(feature)
    return example.SerializeToString()


def _append(feature, name, value):
    kind = type_name(value)
    if kind == "Object" and not is_base64(value):
        raise _unexpected(name, kind)
    if kind in ("True", "False"):
        _list(feature, "int64_list", name).append(int(value))
    elif kind == "Object":
        _list(feature, "bytes_list", name).append(decode_base64(value))
    elif kind == "String":
        _list(feature, "bytes_list", name).append(value.encode(errors="surrogatepass"))
    elif kind != "Number":
        raise _unexpected(name, kind)
    elif isinstance(value, float):
        numbers = _list(feature, "float_list", name)
        if np.isfinite(value) and abs(value) > _MAX_FLOAT:
            raise invalid(
                f"Cannot convert JSON value: {dump(value)} to float without loss of precision."
            )
        numbers.append(value)
    else:
        numbers = _list(feature, "int64_list", name)
        if value >= 2**63:
            raise invalid(f"Feature: {name} has uint64 element. Only int64 is supported.")
        numbers.append(value)


def _unexpected(name, kind):
    return invalid(f"Feature: {name} has element with unexpected JSON type: {kind}")


def _list(feature, kind, name):
    """The feature's values, if it holds values of this kind or none so far."""
    held = feature.WhichOneof("kind")
    if held not in (None, kind):
        raise invalid(f"Unexpected element type in feature: {name} expecting type: {_KINDS[held]}")
    return getattr(feature, kind).value
