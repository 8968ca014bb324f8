"""TLS and mutual TLS for gRPC, from a text SSLConfig; certificates by the openssl command."""

import grpc
import pytest
from tensorflow_serving.apis import get_model_status_pb2, model_service_pb2_grpc

from keras_emr_serving.server.config import store_models
from keras_emr_serving.server.server import Options, Server
from keras_emr_serving.server.status import ServingError
from keras_emr_serving.server.text_protos import read_ssl
from tests.serving import toy


@pytest.fixture(scope="module")
def pem(pem):
    """name -> PEM text."""
    return {path.name: path.read_text() for path in pem.iterdir()}


def config(pem, key="server.key", cert="server.pem", more=""):
    text = f'server_key: "{pem[key]}" server_cert: "{pem[cert]}" {more}'
    return text.replace("\n", "\\n")


def mutual(pem):
    return config(pem, more=f'custom_ca: "{pem["ca.pem"]}" client_verify: true')


def ask(port, credentials):
    """The state of the model, or the code of the failure."""
    request = get_model_status_pb2.GetModelStatusRequest()
    request.model_spec.name = "m"
    address = f"127.0.0.1:{port}"
    opened = (
        grpc.insecure_channel(address)
        if credentials is None
        else grpc.secure_channel(address, credentials)
    )
    with opened as channel:
        stub = model_service_pb2_grpc.ModelServiceStub(channel)
        try:
            answer = stub.GetModelStatus(request, timeout=10)
        except grpc.RpcError as error:
            return error.code().name
    return answer.model_version_status[0].state


@pytest.fixture
def serve(made, tmp_path):
    (tmp_path / "m").mkdir()
    toy.publish(made / "small", tmp_path / "m" / "1")

    def start(text):
        options = Options(rest_port=None, grpc_port=0, grpc_credentials=read_ssl(text))
        return Server(store_models(tmp_path)[:1], options)

    return start


AVAILABLE = get_model_status_pb2.ModelVersionStatus.AVAILABLE


def test_tls(serve, pem):
    trusting = grpc.ssl_channel_credentials(pem["ca.pem"].encode())
    with serve(config(pem)) as server:
        assert ask(server.grpc_port, trusting) == AVAILABLE
        assert ask(server.grpc_port, None) == "UNAVAILABLE"


def test_mutual_tls(serve, pem):
    ca, key, cert = (pem[name].encode() for name in ("ca.pem", "client.key", "client.pem"))
    with serve(mutual(pem)) as server:
        assert ask(server.grpc_port, grpc.ssl_channel_credentials(ca, key, cert)) == AVAILABLE
        assert ask(server.grpc_port, grpc.ssl_channel_credentials(ca)) == "UNAVAILABLE"


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda pem: config(pem, key="client.key"), "server_cert does not match server_key"),
        (lambda pem: config(pem, cert="client.key"), "is not valid PEM"),
        (lambda pem: config(pem, more='custom_ca: "x"'), "custom_ca is not a valid PEM"),
        (lambda pem: config(pem, more="client_verify: true"), "client_verify needs custom_ca"),
        (lambda pem: 'server_key: "x"', "server_cert is missing"),
    ],
)
def test_a_config_that_is_refused(pem, make, text):
    with pytest.raises(ServingError) as error:
        read_ssl(make(pem))
    assert text in error.value.message and "\n" not in error.value.message
