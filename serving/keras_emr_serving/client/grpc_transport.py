"""TensorFlow Serving's gRPC API. Its stubs import TensorFlow, so that only this module does."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path

import numpy as np

from keras_emr.errors import UserError
from keras_emr_serving.client.errors import ClientError, timed_out
from keras_emr_serving.client.signature import Metadata, Signature, Tensor, VersionStatus, sides

_OPTIONS = [
    # gRPC's own limit of 4 MiB is less than the answers to a batch.
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    # Ours says when to ask again.
    ("grpc.enable_retries", 0),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 2000),
]


class GrpcTransport:
    """One model over gRPC; the methods of :class:`RestTransport`.

    Args:
        address, timeout, ca, certificate, key, headers: as there; the timeout is for a whole
            answer, and headers travel as metadata.
    """

    number_bytes = 4

    def __init__(self, address, timeout, ca=None, certificate=None, key=None, headers=None):
        try:
            import grpc
            import tensorflow_serving.apis.prediction_service_pb2_grpc  # noqa: F401
        except ImportError as error:
            raise UserError(
                f"grpc: a package is missing. Received: {error}. Install it with pip install "
                '"keras-emr[serving]", or use REST.'
            ) from None
        self._grpc = grpc
        self.address, self.timeout = address, timeout
        self._metadata = [(name.lower(), value) for name, value in (headers or {}).items()]
        self._files = ca, key, certificate

    @cached_property
    def _channel(self):
        if not self.address.tls:
            return self._grpc.insecure_channel(self.address.target, _OPTIONS)
        pem = [None if path is None else _bytes(path) for path in self._files]
        credentials = self._grpc.ssl_channel_credentials(*pem)
        return self._grpc.secure_channel(self.address.target, credentials, _OPTIONS)

    @cached_property
    def _prediction(self):
        from tensorflow_serving.apis import prediction_service_pb2_grpc as stubs

        return stubs.PredictionServiceStub(self._channel)

    def close(self):
        if "_channel" in self.__dict__:
            self._channel.close()

    def status(self):
        from tensorflow_serving.apis import get_model_status_pb2, model_service_pb2_grpc

        request = self._request(get_model_status_pb2.GetModelStatusRequest)
        service = model_service_pb2_grpc.ModelServiceStub(self._channel)
        states = get_model_status_pb2.ModelVersionStatus.State
        return [
            VersionStatus(row.version, states.Name(row.state), row.status.error_message)
            for row in self._ask(service.GetModelStatus, request).model_version_status
        ]

    def metadata(self):
        from tensorflow_serving.apis import get_model_metadata_pb2

        request = self._request(get_model_metadata_pb2.GetModelMetadataRequest)
        request.metadata_field.append("signature_def")
        answer = self._ask(self._prediction.GetModelMetadata, request)
        signatures = get_model_metadata_pb2.SignatureDefMap()
        if "signature_def" not in answer.metadata:
            raise ClientError("OK", "an answer without signatures.", self.address.model_url)
        answer.metadata["signature_def"].Unpack(signatures)
        found = {
            name: Signature(one.method_name, _tensors(one.inputs), _tensors(one.outputs))
            for name, one in signatures.signature_def.items()
            if not name.startswith("__")
        }
        spec = answer.model_spec
        return Metadata(spec.name, spec.version.value, found)

    def predict(self, name, signature, inputs):
        import tensorflow as tf
        from tensorflow_serving.apis import predict_pb2

        request = self._request(predict_pb2.PredictRequest)
        request.model_spec.signature_name = name
        for key, value in inputs.items():
            request.inputs[key].CopyFrom(tf.make_tensor_proto(value))
        answer = self._ask(self._prediction.Predict, request)
        missing = sorted(set(signature.outputs) - set(answer.outputs))
        if missing:
            message = f"an answer without {', '.join(missing)}."
            raise ClientError("OK", message, self.address.model_url)
        try:
            made = {key: tf.make_ndarray(answer.outputs[key]) for key in signature.outputs}
        except (TypeError, ValueError) as error:
            raise ClientError("OK", f"not a tensor: {error}", self.address.model_url) from None
        return {key: np.asarray(value) for key, value in made.items()}

    def label_names(self, feature, numbers):
        from tensorflow_serving.apis import classification_pb2

        request = self._request(classification_pb2.ClassificationRequest)
        request.model_spec.signature_name = "classify"
        example = request.input.example_list.examples.add()
        example.features.feature[feature].float_list.value.extend([0.0] * numbers)
        answer = self._ask(self._prediction.Classify, request)
        return [one.label for row in answer.result.classifications[:1] for one in row.classes]

    def _request(self, cls):
        request = cls()
        request.model_spec.name = self.address.name
        if self.address.version is not None:
            request.model_spec.version.value = self.address.version
        if self.address.label is not None:
            request.model_spec.version_label = self.address.label
        return request

    def _ask(self, method, request):
        url = self.address.model_url
        try:
            return method(request, timeout=self.timeout, metadata=self._metadata)
        except self._grpc.RpcError as error:
            code, text = error.code().name, (error.details() or "").split("\n")[0]
            if code == "DEADLINE_EXCEEDED":
                raise timed_out(self.timeout, url) from None
            # A message that is too large stays so.
            hopeless = code == "RESOURCE_EXHAUSTED" and "larger than max" in text
            retryable = False if hopeless else None
            raise ClientError(code, text[:600], url, retryable=retryable) from None


def _tensors(described):
    return {name: _tensor(one) for name, one in described.items()}


def _tensor(one):
    from tensorflow.core.framework import types_pb2

    shape = one.tensor_shape
    sizes = sides([dim.size for dim in shape.dim], shape.unknown_rank)
    return Tensor(types_pb2.DataType.Name(one.dtype), sizes)


def _bytes(path):
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise UserError(
            f"TLS: cannot read the file: {error.strerror}. Received: {str(path)!r}. Expected a "
            "PEM file."
        ) from None
