"""The gRPC API: PredictionService, ModelService and health."""

from __future__ import annotations

import functools
import logging
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import grpc
import numpy as np
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

from keras_emr_serving.server import inference
from keras_emr_serving.server.config import from_proto
from keras_emr_serving.server.listen import CannotListen
from keras_emr_serving.server.metadata import signature_map
from keras_emr_serving.server.servable import DEFAULT_SIGNATURE
from keras_emr_serving.server.status import ServingError, from_exception, invalid
from keras_emr_serving.server.tensors import to_proto
from keras_emr_serving.server.warmup import examples_of, run_predict

log = logging.getLogger("keras_emr_serving")
_MAX_TEXT, _CUT = 1024, "...TRUNCATED"
_CODES = {code.value[0]: code for code in grpc.StatusCode}
_UNREADABLE = object()
_STATES = get_model_status_pb2.ModelVersionStatus.State
_MAX_ANSWER = 2**31 - 1
_LONGEST = 10**6  # seconds; a longer deadline is none


def make_server(manager, metrics, options):
    """A gRPC server with all services, bound but not started, and its port.

    Raises:
        CannotListen: the port cannot be had.
    """
    server = grpc.server(
        ThreadPoolExecutor(options.threads, thread_name_prefix="grpc"),
        options=[
            ("grpc.max_receive_message_length", options.max_message),
            ("grpc.max_send_message_length", _MAX_ANSWER),
            ("grpc.so_reuseport", 0),  # a port that is taken must be an error
        ],
        maximum_concurrent_rpcs=options.max_pending,
        interceptors=[_Reading()],
    )
    prediction_service_pb2_grpc.add_PredictionServiceServicer_to_server(
        PredictionService(manager, metrics), server
    )
    model_service_pb2_grpc.add_ModelServiceServicer_to_server(ModelService(manager), server)
    if options.health:
        _add_health(server)
    host = f"[{options.host}]" if ":" in options.host else options.host
    address = f"{host}:{options.grpc_port}"
    try:
        if options.grpc_credentials is None:
            port = server.add_insecure_port(address)
        else:
            port = server.add_secure_port(address, options.grpc_credentials)
    except RuntimeError:
        raise CannotListen("gRPC", address, "address in use or not of this machine") from None
    return server, port


def _add_health(server):
    from grpc_health.v1 import health, health_pb2, health_pb2_grpc

    servicer = health.HealthServicer()
    for name in ("", "ModelService", "PredictionService"):
        servicer.set(name, health_pb2.HealthCheckResponse.SERVING)
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)


class _Reading(grpc.ServerInterceptor):
    """A request that is not its method's message is the client's mistake: gRPC by itself would
    call it ``INTERNAL``."""

    def intercept_service(self, continuation, handler_call_details):
        handler = continuation(handler_call_details)
        if handler is None or handler.unary_unary is None:
            return handler

        def read(data):
            try:
                return handler.request_deserializer(data)
            except Exception:
                return _UNREADABLE

        def answer(request, context):
            if request is _UNREADABLE:
                context.abort(grpc.StatusCode.INVALID_ARGUMENT, "The request cannot be parsed")
            return handler.unary_unary(request, context)

        return grpc.unary_unary_rpc_method_handler(answer, read, handler.response_serializer)


def _answering(method):
    """Failures become gRPC statuses; long texts are cut as TF Serving cuts them."""

    @functools.wraps(method)
    def answer(self, request, context):
        try:
            return method(self, request, context)
        except Exception as found:
            error = from_exception(found)
            if error.code == "INTERNAL" and found is not error and not hasattr(found, "error_code"):
                log.exception("request failed: %s", method.__name__)
        text = error.message
        if len(text) > _MAX_TEXT:
            text = text[: _MAX_TEXT - len(_CUT)] + _CUT
        # gRPC cannot send what is no UTF-8, and would give another code instead.
        context.abort(_CODES[error.number], text.encode(errors="replace").decode())

    return answer


def _counted(method):
    """Counts a method's requests and times them, under its own name."""

    @functools.wraps(method)
    def answer(self, request, context):
        start, code = time.perf_counter(), "OK"
        try:
            return method(self, request, context)
        except Exception as error:
            code = from_exception(error).code
            raise
        finally:
            name = _model_name(request)
            if self._manager.knows(name):  # any name may be asked for
                elapsed = (time.perf_counter() - start) * 1e6
                self._metrics.request(name, method.__name__, "GRPC", code, elapsed)

    return answer


def _model_name(request):
    if hasattr(request, "tasks"):
        return request.tasks[0].model_spec.name if request.tasks else ""
    return request.model_spec.name


def _limited(used, context):
    """The model, to be given up when the client's deadline comes.

    Raises ``DEADLINE_EXCEEDED`` or ``CANCELLED`` if nobody waits for the answer any more.
    """
    left = context.time_remaining()
    if left is not None and left <= 0:
        raise ServingError("DEADLINE_EXCEEDED", "The deadline has passed before the request ran")
    if not context.is_active():
        raise ServingError("CANCELLED", "The client has gone")
    if left is None or left > _LONGEST:
        return used.model
    return replace(used.model, timeout_ms=max(1, int(left * 1000)))


def _target(message):
    """(name, version, label) of a message's model_spec."""
    if not message.HasField("model_spec"):
        raise invalid("Missing ModelSpec")
    spec = message.model_spec
    if not spec.name:
        raise invalid("ModelSpec has no name specified.")
    choice = spec.WhichOneof("version_choice")
    version = spec.version.value if choice == "version" else None
    return spec.name, version, spec.version_label if choice == "version_label" else None


def _echo(spec, target, signature_name, used):
    spec.name, spec.version.value = target[0], used.number
    if signature_name is not None:
        spec.signature_name = signature_name or DEFAULT_SIGNATURE


class PredictionService(prediction_service_pb2_grpc.PredictionServiceServicer):
    def __init__(self, manager, metrics):
        self._manager, self._metrics = manager, metrics

    @_answering
    @_counted
    def Predict(self, request, context):
        target = _target(request)
        response = predict_pb2.PredictResponse()
        with self._manager.use(*target) as used:
            _echo(response.model_spec, target, request.model_spec.signature_name, used)
            outputs = run_predict(_limited(used, context), request)
        for name, array in outputs.items():
            to_proto(array, response.outputs[name])
        self._metrics.examples(target[0], _batch(request))
        return response

    @_answering
    @_counted
    def Classify(self, request, context):
        target, name = _target(request), request.model_spec.signature_name
        response = classification_pb2.ClassificationResponse()
        examples = examples_of(request.input)
        with self._manager.use(*target) as used:
            _echo(response.model_spec, target, name, used)
            found = inference.classify(_limited(used, context), name, examples)
            _fill_classes(response.result, found)
        self._metrics.examples(target[0], len(examples))
        return response

    @_answering
    @_counted
    def Regress(self, request, context):
        target, name = _target(request), request.model_spec.signature_name
        response = regression_pb2.RegressionResponse()
        examples = examples_of(request.input)
        with self._manager.use(*target) as used:
            _echo(response.model_spec, target, name, used)
            for value in inference.regress(_limited(used, context), name, examples):
                response.result.regressions.add(value=value)
        self._metrics.examples(target[0], len(examples))
        return response

    @_answering
    @_counted
    def MultiInference(self, request, context):
        if not request.tasks:
            raise invalid("MultiInferenceRequest has no tasks")
        targets = [_target(task) for task in request.tasks]
        if len({name for name, _, _ in targets}) > 1:
            raise invalid(
                "All ModelSpecs in a MultiInferenceRequest must access the same model name."
            )
        tasks = [(task.model_spec.signature_name, task.method_name) for task in request.tasks]
        examples = examples_of(request.input)
        response = inference_pb2.MultiInferenceResponse()
        with self._manager.use(*targets[0]) as used:
            found = inference.multi_inference(_limited(used, context), tasks, examples)
            for (name, method), result in zip(tasks, found, strict=True):
                one = response.results.add()
                _echo(one.model_spec, targets[0], name, used)
                if method == inference.CLASSIFY:
                    _fill_classes(one.classification_result, result)
                    continue
                for value in result:
                    one.regression_result.regressions.add(value=value)
        self._metrics.examples(targets[0][0], len(examples))
        return response

    @_answering
    def GetModelMetadata(self, request, context):
        target = _target(request)
        if not request.metadata_field:
            raise invalid("GetModelMetadataRequest must specify at least one metadata_field")
        for name in request.metadata_field:
            if name != "signature_def":
                raise invalid(f"Metadata field {name} is not supported")
        response = get_model_metadata_pb2.GetModelMetadataResponse()
        with self._manager.use(*target) as used:
            _echo(response.model_spec, target, None, used)
            response.metadata["signature_def"].Pack(signature_map(used))
        return response


class ModelService(model_service_pb2_grpc.ModelServiceServicer):
    def __init__(self, manager):
        self._manager = manager

    @_answering
    def GetModelStatus(self, request, context):
        response = get_model_status_pb2.GetModelStatusResponse()
        for number, state, error in self._manager.status(*_target(request)[:2]):
            one = response.model_version_status.add(version=number, state=_STATES.Value(state))
            one.status.error_code = error.number if error else 0
            one.status.error_message = error.message if error else ""
        return response

    @_answering
    def HandleReloadConfigRequest(self, request, context):
        try:
            self._manager.reconfigure(from_proto(request.config))
        except ServingError as error:
            log.error("HandleReloadConfigRequest: %s", error)
            raise
        return model_management_pb2.ReloadConfigResponse(status={})


def _fill_classes(result, rows):
    for row in rows:
        classes = result.classifications.add().classes
        for label, score in row:
            classes.add(label=label.decode(errors="replace"), score=score)


def _batch(request):
    dims = [tensor.tensor_shape.dim for tensor in request.inputs.values()]
    return int(np.max([one[0].size for one in dims if one], initial=1))
