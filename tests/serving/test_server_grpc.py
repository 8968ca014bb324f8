"""The gRPC services, asked through the published stubs."""

import grpc
import numpy as np
import pytest
import tensorflow as tf
from grpc_health.v1 import health_pb2, health_pb2_grpc
from tensorflow_serving.apis import (
    classification_pb2,
    get_model_metadata_pb2,
    get_model_status_pb2,
    inference_pb2,
    model_management_pb2,
    model_service_pb2_grpc,
    predict_pb2,
    prediction_service_pb2_grpc,
    regression_pb2,
)
from tensorflow_serving.config import model_server_config_pb2

from keras_emr_serving.server.config import store_models
from keras_emr_serving.server.server import Options, Server
from tests.serving import toy

X = np.float32([[1, 2, 3]])


@pytest.fixture(scope="module")
def channel(server):
    with grpc.insecure_channel(f"127.0.0.1:{server.grpc_port}") as opened:
        yield opened


@pytest.fixture(scope="module")
def predictions(channel):
    return prediction_service_pb2_grpc.PredictionServiceStub(channel)


@pytest.fixture(scope="module")
def models(channel):
    return model_service_pb2_grpc.ModelServiceStub(channel)


def request(signature="", outputs=(), name="m", **inputs):
    made = predict_pb2.PredictRequest(output_filter=outputs)
    made.model_spec.name, made.model_spec.signature_name = name, signature
    for key, value in inputs.items():
        made.inputs[key].CopyFrom(tf.make_tensor_proto(value))
    return made


def example_input(kind, *rows, context=None):
    made = kind()
    target = made.input.example_list
    if context is not None:
        target = made.input.example_list_with_context
        target.context.features.feature["x"].float_list.value.extend(context)
    for row in rows:
        one = target.examples.add()
        if row:
            one.features.feature["x"].float_list.value.extend(row)
    return made


def failure(call, *arguments):
    with pytest.raises(grpc.RpcError) as error:
        call(*arguments, timeout=30)
    return error.value.code().name, error.value.details()


def test_predict(predictions):
    answer = predictions.Predict(request(x=X), timeout=30)
    spec = answer.model_spec
    assert (spec.name, spec.version.value, spec.signature_name) == ("m", 1, "serving_default")
    scores = answer.outputs["scores"]
    assert list(scores.float_val) == [22.0, 28.0]  # as fields, which many clients read
    np.testing.assert_array_equal(tf.make_ndarray(scores), [[22.0, 28.0]])


def test_every_type_survives(predictions):
    answer = predictions.Predict(request("ints", i=np.int32([[1, -2]])), timeout=30)
    found = {name: tf.make_ndarray(tensor) for name, tensor in answer.outputs.items()}
    assert {name: array.dtype.name for name, array in found.items()} == {
        "i8": "int8",
        "u8": "uint8",
        "u32": "uint32",
        "i64": "int64",
        "d": "float64",
        "b": "bool",
    }
    assert found["i8"].tolist() == [[1, -2]] and found["u8"].tolist() == [[1, 254]]
    assert found["d"].tolist() == [[1 / 3, -2 / 3]] and found["b"].tolist() == [[True, False]]
    half = predictions.Predict(request("half", x=X), timeout=30).outputs["h"]
    assert tf.make_ndarray(half).dtype == np.float16 and half.dtype == tf.half.as_datatype_enum
    image = predictions.Predict(request("image", image_bytes=[b"\x00\xff"]), timeout=30)
    assert list(image.outputs["echo_bytes"].string_val) == [b"\x00\xff"]


def test_an_output_filter(predictions):
    answer = predictions.Predict(request("multi", ["class_id"], x=X), timeout=30)
    assert list(answer.outputs) == ["class_id"]


@pytest.mark.parametrize(
    ("message", "code", "text"),
    [
        (predict_pb2.PredictRequest(), "INVALID_ARGUMENT", "Missing ModelSpec"),
        (request(name="", x=X), "INVALID_ARGUMENT", "ModelSpec has no name specified."),
        (
            request(name="nosuch", x=X),
            "NOT_FOUND",
            "Servable not found for request: Latest(nosuch)",
        ),
        (
            request("nosuch", x=X),
            "FAILED_PRECONDITION",
            'Serving signature key "nosuch" not found.',
        ),
        (
            request(),
            "INVALID_ARGUMENT",
            "input size does not match signature: 0!=1 len({}) != len({x}). Sent extra: {}. "
            "Missing but required: {x}.",
        ),
        (
            request(zz=X),
            "INVALID_ARGUMENT",
            "Signature input alias: x(feed name: serving_default_x:0) not found in request and no "
            "default value provided. Inputs expected to be in the request {zz}, or default input "
            "alias set: ",
        ),
        (
            request(x=np.float64(X)),
            "INVALID_ARGUMENT",
            "Expects arg[0] to be float but double is provided",
        ),
        (
            request("", ["nope"], x=X),
            "INVALID_ARGUMENT",
            "output tensor alias not found in signature: nope Outputs expected to be in the set "
            "{scores}.",
        ),
        (
            request("", ["scores", "scores"], x=X),
            "INVALID_ARGUMENT",
            "duplicate output tensor alias: scores",
        ),
        (request("jit", x=X), "INTERNAL", "XLA compilation disabled"),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else "",
)
def test_a_predict_that_fails(predictions, message, code, text):
    found, details = failure(predictions.Predict, message)
    assert (found, details.split("\n")[0]) == (code, text)


def test_versions_and_labels(predictions):
    made = request(x=X)
    made.model_spec.version.value = 1
    assert predictions.Predict(made, timeout=30).model_spec.version.value == 1
    made.model_spec.version.value = 9
    assert failure(predictions.Predict, made) == (
        "NOT_FOUND",
        "Servable not found for request: Specific(m, 9)",
    )
    made.model_spec.version_label = "foo"
    assert failure(predictions.Predict, made) == (
        "INVALID_ARGUMENT",
        "Unrecognized servable version label: foo",
    )


def test_a_tensor_with_few_values_repeats_the_last(predictions):
    made = request(x=X)
    del made.inputs["x"].float_val[:]
    made.inputs["x"].tensor_content = b""
    made.inputs["x"].float_val.append(2.0)
    answer = predictions.Predict(made, timeout=30)
    assert list(answer.outputs["scores"].float_val) == [18.0, 24.0]


@pytest.mark.parametrize("change", ["content", "huge", "negative", "type", "rank"])
def test_a_tensor_that_is_none(predictions, change):
    made = request(x=X)
    tensor = made.inputs["x"]
    if change == "content":
        tensor.tensor_content = b"abc"
    elif change == "huge":  # 4 TB for one value
        tensor.tensor_content = b""
        tensor.float_val.append(1.0)
        tensor.tensor_shape.dim[0].size = 10**12
    elif change == "negative":
        tensor.tensor_shape.dim[0].size = -1
    elif change == "type":
        tensor.dtype = 0
    else:
        for _ in range(100):
            tensor.tensor_shape.dim.add(size=1)
    code, details = failure(predictions.Predict, made)
    assert code == "INVALID_ARGUMENT" and details.startswith("tensor parsing error")
    assert predictions.Predict(request(x=X), timeout=30).outputs["scores"].float_val[0] == 22.0


def test_a_long_error_is_cut(predictions):
    _, details = failure(predictions.Predict, request("n" * 2000, x=X))
    assert len(details) == 1024 and details.endswith("...TRUNCATED")


def test_classify_and_regress(predictions):
    made = example_input(classification_pb2.ClassificationRequest, [1, 2, 3], [0.5, 0.5, 0.5])
    made.model_spec.name, made.model_spec.signature_name = "m", "classify"
    answer = predictions.Classify(made, timeout=30)
    rows = [[(c.label, c.score) for c in one.classes] for one in answer.result.classifications]
    assert rows == [[("a", 22.0), ("b", 28.0)], [("a", 4.5), ("b", 6.0)]]
    assert answer.model_spec.version.value == 1
    made = example_input(regression_pb2.RegressionRequest, None, None, context=[1, 2, 3])
    made.model_spec.name, made.model_spec.signature_name = "m", "regress"
    answer = predictions.Regress(made, timeout=30)
    assert [one.value for one in answer.result.regressions] == [6.0, 6.0]
    made.input.Clear()
    assert failure(predictions.Regress, made) == ("INVALID_ARGUMENT", "Input is empty.")
    made.model_spec.signature_name = "nosuch"
    assert failure(predictions.Regress, made) == (
        "INVALID_ARGUMENT",
        "No signature was found with the name: nosuch",
    )


def test_multi_inference(predictions):
    made = example_input(inference_pb2.MultiInferenceRequest, [1, 2, 3])
    for name in ("classify", "regress"):
        task = made.tasks.add(method_name=f"tensorflow/serving/{name}")
        task.model_spec.name, task.model_spec.signature_name = "m", name
    # Two signatures of this model have an input each; one run feeds both.
    first, second = predictions.MultiInference(made, timeout=30).results
    assert [c.score for c in first.classification_result.classifications[0].classes] == [22.0, 28.0]
    assert second.regression_result.regressions[0].value == 6.0
    made.tasks[1].CopyFrom(made.tasks[0])
    assert failure(predictions.MultiInference, made) == (
        "INVALID_ARGUMENT",
        "Duplicate evaluation of signature: classify",
    )
    made.tasks[1].model_spec.signature_name = "regress"
    made.tasks[1].method_name = "tensorflow/serving/predict"
    assert failure(predictions.MultiInference, made) == (
        "UNIMPLEMENTED",
        "Unsupported signature method_name: tensorflow/serving/predict",
    )


def test_metadata(predictions):
    made = get_model_metadata_pb2.GetModelMetadataRequest(metadata_field=["signature_def"])
    made.model_spec.name = "m"
    answer = predictions.GetModelMetadata(made, timeout=30)
    signatures = get_model_metadata_pb2.SignatureDefMap()
    assert answer.metadata["signature_def"].Unpack(signatures)
    assert signatures.signature_def["serving_default"].inputs["x"].name == "serving_default_x:0"
    assert answer.model_spec.version.value == 1
    made.metadata_field[0] = "other"
    code, text = failure(predictions.GetModelMetadata, made)
    assert (code, text) == ("INVALID_ARGUMENT", "Metadata field other is not supported")


def test_status(models):
    made = get_model_status_pb2.GetModelStatusRequest()
    assert failure(models.GetModelStatus, made) == ("INVALID_ARGUMENT", "Missing ModelSpec")
    made.model_spec.name = "m"
    (row,) = models.GetModelStatus(made, timeout=30).model_version_status
    assert (row.version, row.State.Name(row.state)) == (1, "AVAILABLE")
    assert (row.status.error_code, row.status.error_message) == (0, "")
    made.model_spec.name = "no"
    assert failure(models.GetModelStatus, made) == (
        "NOT_FOUND",
        "Could not find any versions of model no",
    )


def test_health(channel):
    stub = health_pb2_grpc.HealthStub(channel)
    for name in ("", "ModelService", "PredictionService"):
        answer = stub.Check(health_pb2.HealthCheckRequest(service=name), timeout=30)
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
    assert failure(stub.Check, health_pb2.HealthCheckRequest(service="x"))[0] == "NOT_FOUND"


def test_reload(made, tmp_path):
    """A new configuration over gRPC: one more model, then labels, and mistakes that change
    nothing."""
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        toy.publish(made / "small", tmp_path / name / "1")
    options = Options(rest_port=None, grpc_port=0)
    with (
        Server(store_models(tmp_path)[:1], options) as server,
        grpc.insecure_channel(f"127.0.0.1:{server.grpc_port}") as channel,
    ):
        models = model_service_pb2_grpc.ModelServiceStub(channel)
        predictions = prediction_service_pb2_grpc.PredictionServiceStub(channel)

        def reload(label=None, **paths):
            config = model_server_config_pb2.ModelServerConfig()
            config.model_config_list.SetInParent()
            for name, path in paths.items():
                one = config.model_config_list.config.add(
                    name=name, base_path=str(path), model_platform="tensorflow"
                )
                if label:
                    one.version_labels["stable"] = label
            message = model_management_pb2.ReloadConfigRequest(config=config)
            return models.HandleReloadConfigRequest(message, timeout=30).status

        both = {name: tmp_path / name for name in ("a", "b")}
        assert failure(predictions.Predict, request(name="b", x=X))[0] == "NOT_FOUND"
        assert reload(**both).error_code == 0
        assert reload(1, **both).error_code == 0
        labelled = request(name="b", x=X)
        labelled.model_spec.version_label = "stable"
        assert predictions.Predict(labelled, timeout=30).model_spec.version.value == 1
        for mistake, code, text in (
            ({"a": "relative"}, "INVALID_ARGUMENT", "Expected model a to have an absolute path"),
            ({"label": 2, **both}, "FAILED_PRECONDITION", "Request to assign label to version 2"),
            ({"label": 2, "a": both["a"]}, "FAILED_PRECONDITION", "to version 2 of model a"),
        ):
            with pytest.raises(grpc.RpcError) as error:
                reload(**mistake)
            assert error.value.code().name == code and text in error.value.details()
            assert predictions.Predict(labelled, timeout=30).model_spec.version.value == 1
        with pytest.raises(grpc.RpcError) as error:
            reload(**both, c=tmp_path / "c")
        assert error.value.code().name == "UNKNOWN"
        assert "1 servable(s) did not become available: {{{name: c}" in error.value.details()
        empty = model_management_pb2.ReloadConfigRequest()
        code, text = failure(models.HandleReloadConfigRequest, empty)
        assert code == "INVALID_ARGUMENT" and "Only ModelConfigList is currently" in text
