"""TF Serving's text files whose messages its Python package does not ship.

Numbers and names of the fields are those of ``session_bundle_config.proto``, ``ssl_config.proto``
and ``monitoring_config.proto``, as far as they are understood here.
"""

from __future__ import annotations

import functools
import ssl
import tempfile
from dataclasses import dataclass
from pathlib import Path

from keras_emr_serving.server.status import invalid

_INT, _BOOL, _TEXT = "Int64Value", "BoolValue", "StringValue"
# message -> field -> (number, type, repeated)
_MESSAGES = {
    "BatchingParameters": {
        "max_batch_size": (1, _INT, False),
        "batch_timeout_micros": (2, _INT, False),
        "max_enqueued_batches": (3, _INT, False),
        "num_batch_threads": (4, _INT, False),
        "thread_pool_name": (5, _TEXT, False),
        "allowed_batch_sizes": (6, "int64", True),
        "pad_variable_length_inputs": (7, "bool", False),
        "enable_large_batch_splitting": (8, _BOOL, False),
        "max_execution_batch_size": (9, _INT, False),
    },
    "SSLConfig": {
        "server_key": (1, "string", False),
        "server_cert": (2, "string", False),
        "custom_ca": (3, "string", False),
        "client_verify": (4, "bool", False),
    },
    "PrometheusConfig": {"enable": (1, "bool", False), "path": (2, "string", False)},
    "MonitoringConfig": {"prometheus_config": (1, ".PrometheusConfig", False)},
}


@functools.cache
def _classes():
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory, wrappers_pb2

    kinds = descriptor_pb2.FieldDescriptorProto
    plain = {"int64": kinds.TYPE_INT64, "bool": kinds.TYPE_BOOL, "string": kinds.TYPE_STRING}
    pool = descriptor_pool.DescriptorPool()
    wrappers = descriptor_pb2.FileDescriptorProto()
    wrappers_pb2.DESCRIPTOR.CopyToProto(wrappers)
    pool.Add(wrappers)
    package = "keras_emr_serving.text"
    file = descriptor_pb2.FileDescriptorProto(
        name="keras_emr_serving/text.proto",
        package=package,
        syntax="proto3",
        dependency=[wrappers.name],
    )
    for name, fields in _MESSAGES.items():
        message = file.message_type.add(name=name)
        for field, (number, kind, repeated) in fields.items():
            label = kinds.LABEL_REPEATED if repeated else kinds.LABEL_OPTIONAL
            made = message.field.add(name=field, number=number, label=label)
            if kind in plain:
                made.type = plain[kind]
            else:
                made.type = kinds.TYPE_MESSAGE
                where = package + kind if kind[0] == "." else f"google.protobuf.{kind}"
                made.type_name = "." + where
    pool.Add(file)
    return {
        name: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{package}.{name}"))
        for name in _MESSAGES
    }


def _parse(kind, text):
    from google.protobuf import text_format

    try:
        return text_format.Parse(text, _classes()[kind]())
    except text_format.ParseError as error:
        raise invalid(f"not a {kind}: {error}") from None


@dataclass(frozen=True)
class Batching:
    """How requests are put together; the defaults are TF Serving's."""

    max_batch_size: int = 1000
    timeout_seconds: float = 0.0
    max_enqueued_batches: int = 10
    threads: int = 2
    allowed_sizes: tuple[int, ...] = ()
    pad_inputs: bool = False


def read_batching(text: str, cpus: int = 2) -> Batching:
    """A text ``BatchingParameters``. Raises ``INVALID_ARGUMENT``."""
    found = _parse("BatchingParameters", text)

    def number(name, default, least):
        if not found.HasField(name):
            return default
        value = getattr(found, name).value
        if value < least:
            raise invalid(f"{name} must be at least {least}; was {value}")
        return value

    size = number("max_batch_size", 1000, 1)
    allowed = tuple(found.allowed_batch_sizes)
    if allowed and (list(allowed) != sorted(set(allowed)) or allowed[0] < 1):
        raise invalid("allowed_batch_sizes entries must be monotonically increasing")
    if allowed and allowed[-1] != size:
        raise invalid(
            f"Last entry in allowed_batch_sizes must match max_batch_size; last was {allowed[-1]}; "
            f"expected {size}"
        )
    return Batching(
        size,
        number("batch_timeout_micros", 0, 0) / 1e6,
        number("max_enqueued_batches", 10, 1),
        number("num_batch_threads", cpus, 1),
        allowed,
        found.pad_variable_length_inputs,
    )


def read_monitoring(text: str, default_path: str) -> str | None:
    """The path for Prometheus in a text ``MonitoringConfig``; ``None``: off."""
    config = _parse("MonitoringConfig", text).prometheus_config
    return (config.path or default_path) if config.enable else None


def read_ssl(text: str):
    """gRPC server credentials of a text ``SSLConfig`` (PEM contents, not paths).

    Raises ``INVALID_ARGUMENT`` for a key or certificate that cannot be used, or do not match.
    """
    import grpc

    found = _parse("SSLConfig", text)
    for field in ("server_key", "server_cert"):
        if not getattr(found, field):
            raise invalid(f"SSLConfig: {field} is missing")
    if found.client_verify and not found.custom_ca:
        raise invalid("SSLConfig: client_verify needs custom_ca, who signs the clients")
    _check_pair(found)
    return grpc.ssl_server_credentials(
        [(found.server_key.encode(), found.server_cert.encode())],
        root_certificates=found.custom_ca.encode() or None,
        require_client_auth=found.client_verify,
    )


def _check_pair(found):
    """gRPC itself would only fail at every handshake."""
    with tempfile.TemporaryDirectory() as folder:
        paths = []
        for field in ("server_cert", "server_key", "custom_ca"):
            path = Path(folder) / field
            path.touch(mode=0o600)
            path.write_text(getattr(found, field))
            paths.append(path)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        try:
            # An encrypted key must not ask at the terminal.
            context.load_cert_chain(paths[0], paths[1], password=lambda: "")
        except ssl.SSLError as error:
            if "MISMATCH" in (error.reason or ""):
                raise invalid("SSLConfig: server_cert does not match server_key") from None
            raise invalid(
                f"SSLConfig: server_cert or server_key is not valid PEM ({error.reason})"
            ) from None
        if found.custom_ca:
            try:
                context.load_verify_locations(paths[2])
            except ssl.SSLError as error:
                raise invalid(
                    f"SSLConfig: custom_ca is not a valid PEM certificate ({error.reason})"
                ) from None
