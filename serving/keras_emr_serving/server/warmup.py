"""Warm-up records: requests that are run once before a version becomes available."""

from __future__ import annotations

from pathlib import Path

from keras_emr_serving.server import inference
from keras_emr_serving.server.status import ServingError, invalid
from keras_emr_serving.server.tensors import to_array

FILE = Path("assets.extra") / "tf_serving_warmup_requests"
MAX_RECORDS = 1000


def replay(folder: Path, model: inference.Model) -> int:
    """Run every record of the version in ``folder``; how many there were.

    Raises:
        ServingError: a record that cannot be read, or fails, or is one too many. The version must
            then not be served.
    """
    path = folder / FILE
    if not path.exists():
        return 0
    import tensorflow as tf
    from tensorflow_serving.apis.prediction_log_pb2 import PredictionLog

    count = 0
    records = tf.compat.v1.python_io.tf_record_iterator(str(path))
    while True:
        try:
            record = next(records)
        except StopIteration:
            return count
        except tf.errors.OpError as error:
            raise invalid(f"Failed to read warmup records of {path}: {error.message}") from None
        if count == MAX_RECORDS:
            raise invalid(f"Number of warmup records exceeds the maximum ({MAX_RECORDS}) at {path}")
        count += 1
        log = PredictionLog()
        try:
            log.ParseFromString(record)
        except Exception as error:
            raise invalid(f"Failed to parse warmup record: {error}") from None
        _run(log, model)


def _run(log, model):
    kind = log.WhichOneof("log_type")
    if kind == "predict_log":
        run_predict(model, log.predict_log.request)
    elif kind == "predict_streamed_log":
        for request in log.predict_streamed_log.request:
            run_predict(model, request)
    elif kind == "classify_log":
        request = log.classify_log.request
        inference.classify(model, request.model_spec.signature_name, examples_of(request.input))
    elif kind == "regress_log":
        request = log.regress_log.request
        inference.regress(model, request.model_spec.signature_name, examples_of(request.input))
    elif kind == "multi_inference_log":
        request = log.multi_inference_log.request
        tasks = [(task.model_spec.signature_name, task.method_name) for task in request.tasks]
        inference.multi_inference(model, tasks, examples_of(request.input))
    elif kind == "session_run_log":
        request = log.session_run_log.request
        feeds = [(one.name, to_array(one.tensor)) for one in request.feed]
        model.call("SessionRun", feeds, list(request.fetch), {})
    else:
        raise ServingError("UNIMPLEMENTED", f"Unsupported log_type for warmup: {kind}")


def run_predict(model, request):
    """A ``PredictRequest`` proto: output name -> array."""
    inputs = {name: to_array(tensor) for name, tensor in request.inputs.items()}
    return inference.predict(
        model, request.model_spec.signature_name, inputs, request.output_filter
    )


def examples_of(message):
    """Serialized examples of an ``Input`` proto, the context put before each."""
    kind = message.WhichOneof("kind")
    if kind == "example_list":
        return [one.SerializeToString() for one in message.example_list.examples]
    if kind == "example_list_with_context":
        both = message.example_list_with_context
        context = both.context.SerializeToString()
        return [context + one.SerializeToString() for one in both.examples]
    return []
