"""What a running server says of its models, over REST or gRPC, and how to make it reload."""

from __future__ import annotations

import http.client
import json
import urllib.error
import urllib.parse
import urllib.request
from dataclasses import dataclass
from pathlib import Path

from keras_emr.errors import UserError

SECONDS = 10.0


class ServerTrouble(Exception):
    """A running server that cannot be reached, refuses, or does not follow in time."""


@dataclass(frozen=True)
class State:
    """One version on a server. ``state``: START, LOADING, AVAILABLE, UNLOADING or END."""

    state: str
    error: str = ""


class RestServer:
    """A server's REST API.

    Args:
        url: ``http://HOST:PORT``; what a client would use (``.../v1/models/NAME``) will do too.

    Raises:
        UserError: not such an address.
    """

    def __init__(self, url: str):
        try:
            parts = urllib.parse.urlsplit(url)
            fits = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
        except ValueError:
            fits = False
        if not fits or any(one.isspace() for one in url):
            raise UserError(f"--url: not an address. Received: {url!r}. Expected http://HOST:8501.")
        self.where = f"{parts.scheme}://{parts.netloc}{parts.path.split('/v1')[0].rstrip('/')}"

    def states(self, name: str) -> dict[int, State]:
        """Version -> state; empty if the server has no such model.

        Raises:
            ServerTrouble: no answer, or one that is not a server's.
        """
        answer = self._get(name, "")
        try:
            return {
                int(one["version"]): State(one["state"], one["status"]["error_message"])
                for one in answer.get("model_version_status", [])
            }
        except (ValueError, KeyError, TypeError):
            raise self._stranger() from None

    def labelled(self, name: str, label: str) -> int | None:
        """The version that answers to ``label`` now; ``None`` if none does.

        A server's status leaves labels out of account: its metadata tells.
        """
        answer = self._get(name, f"/labels/{urllib.parse.quote(label, safe='')}/metadata")
        try:
            return int(answer["model_spec"]["version"]) if answer else None
        except (ValueError, KeyError, TypeError):
            raise self._stranger() from None

    def _get(self, name, rest):
        path = f"/v1/models/{urllib.parse.quote(name, safe='')}{rest}"
        try:
            with urllib.request.urlopen(self.where + path, timeout=SECONDS) as answer:
                found = json.loads(answer.read(16 << 20))
        except urllib.error.HTTPError as error:
            with error:
                text = error.read(1 << 16)
            if error.code in (400, 404) and b'"error"' in text:
                return {}
            raise ServerTrouble(f"{self.where} answers {error.code} to GET {path}") from None
        except json.JSONDecodeError:
            raise self._stranger() from None
        except (OSError, ValueError, http.client.HTTPException) as error:
            if isinstance(error, http.client.BadStatusLine):  # its text is whatever came
                raise self._stranger() from None
            reason = getattr(error, "reason", None) or error
            raise ServerTrouble(f"no answer from {self.where}: {reason}") from None
        if not isinstance(found, dict):
            raise self._stranger()
        return found

    def _stranger(self):
        return ServerTrouble(
            f"{self.where} does not answer as TensorFlow Serving's REST API does. Is it that port?"
        )

    def reload(self, text: str) -> None:
        """Nothing: over REST a server cannot be told. It looks at the file by itself."""


class GrpcServer:
    """A server's gRPC API.

    Args:
        address: ``HOST:PORT``.
        ca: file with who signed the server's certificate; ``None``: no TLS.
        certificate, key: files, for a server that verifies its clients.

    Raises:
        UserError: not an address, or a file that cannot be read.
    """

    def __init__(self, address, ca=None, certificate=None, key=None):
        host, _, port = address.rpartition(":")
        if not host or not port.isdigit() or not 0 < int(port) < 65536:
            raise UserError(
                f"--grpc: not an address. Received: {address!r}. Expected HOST:PORT, such as "
                "localhost:8500."
            )
        if bool(certificate) != bool(key):
            raise UserError("--grpc-cert: it goes with --grpc-key. Received: only one of them.")
        if certificate and not ca:
            raise UserError(f"--grpc-cert: it needs --grpc-ca. Received: {certificate!r} alone.")
        self.where = address
        files = {"--grpc-ca": ca, "--grpc-key": key, "--grpc-cert": certificate}
        pem = {flag: _read(flag, path) for flag, path in files.items()}
        import grpc
        from tensorflow_serving.apis import model_service_pb2_grpc, prediction_service_pb2_grpc

        if ca is None:
            channel = grpc.insecure_channel(address)
        else:
            credentials = grpc.ssl_channel_credentials(*pem.values())
            channel = grpc.secure_channel(address, credentials)
        self._models = model_service_pb2_grpc.ModelServiceStub(channel)
        self._predictions = prediction_service_pb2_grpc.PredictionServiceStub(channel)

    def states(self, name: str) -> dict[int, State]:
        """As :meth:`RestServer.states`."""
        from tensorflow_serving.apis import get_model_status_pb2

        request = get_model_status_pb2.GetModelStatusRequest()
        request.model_spec.name = name
        answer = self._ask(self._models.GetModelStatus, request)
        names = get_model_status_pb2.ModelVersionStatus.State
        return {
            one.version: State(names.Name(one.state), one.status.error_message)
            for one in (answer.model_version_status if answer else ())
        }

    def labelled(self, name: str, label: str) -> int | None:
        """As :meth:`RestServer.labelled`."""
        from tensorflow_serving.apis import get_model_metadata_pb2

        request = get_model_metadata_pb2.GetModelMetadataRequest(metadata_field=["signature_def"])
        request.model_spec.name, request.model_spec.version_label = name, label
        answer = self._ask(self._predictions.GetModelMetadata, request)
        return answer.model_spec.version.value if answer else None

    def _ask(self, method, request):
        import grpc

        try:
            return method(request, timeout=SECONDS)
        except grpc.RpcError as error:
            if error.code() in (grpc.StatusCode.NOT_FOUND, grpc.StatusCode.INVALID_ARGUMENT):
                return None
            raise self._trouble(error) from None

    def reload(self, text: str) -> None:
        """Tell the server to take over the configuration ``text``.

        Raises:
            ServerTrouble: it cannot be reached, or refuses.
        """
        import grpc
        from google.protobuf import text_format
        from tensorflow_serving.apis import model_management_pb2

        request = model_management_pb2.ReloadConfigRequest()
        text_format.Parse(text, request.config, allow_unknown_field=True)
        try:
            answer = self._models.HandleReloadConfigRequest(request, timeout=300)
        except grpc.RpcError as error:
            raise self._trouble(error) from None
        if answer.status.error_code:
            raise ServerTrouble(
                f"{self.where} refuses the configuration: {answer.status.error_message}"
            )

    def _trouble(self, error):
        return ServerTrouble(f"{self.where}: {error.code().name}: {error.details()}")


def _read(flag, path):
    if path is None:
        return None
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"{flag}: cannot be read: {error.strerror}. Received: {path!r}.") from None
