"""Predict, classify, regress and multi-inference on a loaded model, for REST and gRPC alike."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from keras_emr_serving.server.servable import DEFAULT_SIGNATURE
from keras_emr_serving.server.status import ServingError, invalid

CLASSIFY = "tensorflow/serving/classify"
REGRESS = "tensorflow/serving/regress"
# (feeds, fetches, timeout in ms, infos) -> (values, microseconds)
Run = Callable[..., tuple[list[np.ndarray], float]]


@dataclass(frozen=True)
class Model:
    """What a request needs of a model: its signatures and a way to run them."""

    signatures: Mapping[str, object]
    run: Run
    timeout_ms: int | None = None
    on_runtime: Callable[[str, float], None] = lambda api, microseconds: None

    def call(self, api, feeds, fetches, infos):
        values, elapsed = self.run(feeds, fetches, self.timeout_ms, infos)
        self.on_runtime(api, elapsed)
        return values


def predict(
    model: Model,
    signature_name: str,
    inputs: Mapping[str, np.ndarray],
    output_filter: Sequence[str] = (),
) -> dict[str, np.ndarray]:
    """Output name -> array. Raises :class:`ServingError` in TF Serving's words."""
    key = signature_name or DEFAULT_SIGNATURE
    signature = model.signatures.get(key)
    if signature is None:
        raise ServingError("FAILED_PRECONDITION", f'Serving signature key "{key}" not found.')
    feeds, infos = _feeds(signature, inputs)
    aliases = _aliases(signature, output_filter)
    values = model.call("Predict", feeds, [signature.outputs[a].name for a in aliases], infos)
    return dict(zip(aliases, values, strict=True))


def _feeds(signature, inputs):
    given, wanted = set(inputs), set(signature.inputs)
    defaults = set(signature.defaults)
    if len(given) > len(wanted) or (len(given) < len(wanted) and not defaults):
        raise invalid(
            f"input size does not match signature: {len(given)}!={len(wanted)} len({_set(given)}) "
            f"!= len({_set(wanted)}). Sent extra: {_set(given - wanted)}. Missing but required: "
            f"{_set(wanted - given)}."
        )
    feeds, infos = [], {}
    for alias in sorted(wanted):
        info = signature.inputs[alias]
        if alias in inputs:
            array = inputs[alias]
        elif alias in defaults:
            from tensorflow import make_ndarray

            array = make_ndarray(signature.defaults[alias])
        else:
            raise invalid(
                f"Signature input alias: {alias}(feed name: {info.name}) not found in request and "
                f"no default value provided. Inputs expected to be in the request {_set(given)}, "
                f"or default input alias set: {','.join(sorted(defaults))}"
            )
        feeds.append((info.name, array))
        infos[info.name] = info
    return feeds, infos


def _set(names):
    return f"{{{','.join(sorted(names))}}}"


def _aliases(signature, output_filter):
    seen = []
    for alias in output_filter:
        if alias not in signature.outputs:
            raise invalid(
                f"output tensor alias not found in signature: {alias} Outputs expected to be in "
                f"the set {_set(signature.outputs)}."
            )
        if alias in seen:
            raise invalid(f"duplicate output tensor alias: {alias}")
        seen.append(alias)
    return seen or list(signature.outputs)


def classify(
    model: Model, signature_name: str, examples: Sequence[bytes]
) -> list[list[tuple[bytes, float]]]:
    """For every serialized example its (label, score) pairs; a label or score it lacks is empty."""
    signature = _named(model, signature_name)
    feed = _classify_input(signature)
    names = [name for name in ("classes", "scores") if name in signature.outputs]
    values = _run_examples(model, "Classify", feed, signature, names, examples)
    return _classes(dict(zip(names, values, strict=True)), len(examples))


def regress(model: Model, signature_name: str, examples: Sequence[bytes]) -> list[float]:
    """One value for every serialized example."""
    signature = _named(model, signature_name)
    feed = _regress_input(signature)
    (values,) = _run_examples(model, "Regress", feed, signature, ["outputs"], examples)
    return _regressions(values, len(examples))


def multi_inference(model: Model, tasks: Sequence[tuple[str, str]], examples: Sequence[bytes]):
    """Several signatures on the same examples, in one run.

    Args:
        tasks: (signature name, method name) pairs.

    Returns:
        For each task what :func:`classify` or :func:`regress` would return.
    """
    plan, feeds, fetches, seen = [], {}, [], set()
    for name, method in tasks:
        key = name or DEFAULT_SIGNATURE
        if key in seen:
            raise invalid(f"Duplicate evaluation of signature: {key}")
        seen.add(key)
        signature = _named(model, name)
        if method == CLASSIFY:
            feed = _classify_input(signature)
            names = [one for one in ("classes", "scores") if one in signature.outputs]
        elif method == REGRESS:
            feed, names = _regress_input(signature), ["outputs"]
        else:
            raise ServingError("UNIMPLEMENTED", f"Unsupported signature method_name: {method}")
        feeds[feed.name] = feed
        plan.append((method, names, len(fetches)))
        fetches += [signature.outputs[one].name for one in names]
    array = _strings(examples)
    values = model.call("MultiInference", [(n, array) for n in feeds], fetches, feeds)
    results = []
    for method, names, start in plan:
        part = dict(zip(names, values[start:], strict=False))
        if method == CLASSIFY:
            results.append(_classes(part, len(examples)))
        else:
            results.append(_regressions(part["outputs"], len(examples)))
    return results


def _named(model, name):
    key = name or DEFAULT_SIGNATURE
    signature = model.signatures.get(key)
    if signature is None:
        raise invalid(f"No signature was found with the name: {key}")
    return signature


def _debug(signature):
    from google.protobuf import text_format

    return f"goo.gle/debugproto  \n{text_format.MessageToString(signature)}"


def _classify_input(signature):
    if len(signature.inputs) != 1:
        raise invalid("Expected one input Tensor.")
    if len(signature.outputs) not in (1, 2):
        raise invalid(f"Expected one or two output Tensors, found {len(signature.outputs)}")
    if "inputs" not in signature.inputs:
        raise ServingError(
            "FAILED_PRECONDITION",
            f"No classification inputs found in SignatureDef: {_debug(signature)}",
        )
    if not {"classes", "scores"} & set(signature.outputs):
        raise ServingError(
            "FAILED_PRECONDITION",
            "Expected classification signature outputs to contain at least one of "
            f'"classes" or "scores". Signature was: {_debug(signature)}',
        )
    return signature.inputs["inputs"]


def _regress_input(signature):
    if len(signature.inputs) != 1:
        raise invalid("Expected one input Tensor.")
    if len(signature.outputs) != 1:
        raise invalid("Expected one output Tensor.")
    for kind in ("inputs", "outputs"):
        if kind not in getattr(signature, kind):
            raise ServingError(
                "FAILED_PRECONDITION",
                f"No regression {kind} found in SignatureDef: {_debug(signature)}",
            )
    return signature.inputs["inputs"]


def _strings(examples):
    if not examples:
        raise invalid("Input is empty.")
    array = np.empty(len(examples), object)
    array[:] = examples
    return array


def _run_examples(model, api, feed, signature, names, examples):
    fetches = [signature.outputs[name].name for name in names]
    return model.call(api, [(feed.name, _strings(examples))], fetches, {feed.name: feed})


def _shape(array):
    return f"[{','.join(map(str, array.shape))}]"


def _classes(outputs, n):
    for name, wanted in (("classes", object), ("scores", np.float32)):
        array = outputs.get(name)
        if array is None:
            continue
        if array.ndim != 2:
            raise invalid(
                f"Expected Tensor shape: [batch_size num_classes] but got {_shape(array)}"
            )
        if array.dtype != wanted:
            type_name = "DT_STRING" if wanted is object else "DT_FLOAT"
            raise invalid(f"Expected {name} Tensor of {type_name}. Got: {_dt(array)}")
        if len(array) != n:
            raise invalid(f"Expected {name} output batch size of {n}. Got: {len(array)}")
    labels, scores = outputs.get("classes"), outputs.get("scores")
    if labels is None:
        labels = np.full(scores.shape, b"", object)
    elif scores is None:
        scores = np.zeros(labels.shape, np.float32)
    if labels.shape != scores.shape:
        raise invalid(
            "Tensors class and score should match in dim_size(1). Got "
            f"{labels.shape[1]} vs. {scores.shape[1]}"
        )
    return [
        list(zip(row.tolist(), values.tolist(), strict=True))
        for row, values in zip(labels, scores, strict=True)
    ]


def _regressions(array, n):
    if not (array.ndim == 1 or (array.ndim == 2 and array.shape[1] == 1)):
        raise invalid(
            "Expected output Tensor shape to be either [batch_size] or [batch_size, 1] but got "
            f"{_shape(array)}"
        )
    if len(array) != n:
        raise invalid(f"Input batch size did not match output batch size: {n} vs. {len(array)}")
    if array.dtype != np.float32:
        raise invalid(f"Expected output Tensor of DT_FLOAT.  Got: {_dt(array)}")
    return array.reshape(-1).tolist()


def _dt(array):
    if array.dtype == object:
        return "DT_STRING"
    from tensorflow import dtypes
    from tensorflow.core.framework.types_pb2 import DataType

    return DataType.Name(dtypes.as_dtype(array.dtype).as_datatype_enum)
