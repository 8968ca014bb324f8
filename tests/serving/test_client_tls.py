"""The client over TLS, with and without a certificate of its own."""

import http.server
import json
import ssl
import threading

import numpy as np
import pytest

from keras_emr.errors import UserError
from keras_emr_serving import Client, ClientError
from tests.serving import image_model
from tests.serving.image_model import ServerProcess, expected, images
from tests.serving.scripted import METADATA


def own(pem):
    return {"certificate": pem / "client.pem", "key": pem / "client.key"}


@pytest.fixture(scope="module")
def mutual(pem, tmp_path_factory):
    """A gRPC server that asks for certificates: its URL."""
    folder = tmp_path_factory.mktemp("images")
    text = {name: (pem / name).read_text() for name in ("server.key", "server.pem", "ca.pem")}
    fields = zip(("server_key", "server_cert", "custom_ca"), text.values(), strict=True)
    lines = [f'{field}: "{value}"'.replace("\n", "\\n") for field, value in fields]
    (folder / "ssl").write_text("\n".join([*lines, "client_verify: true"]))
    config = image_model.build_store(folder)
    with ServerProcess(config, "--ssl-config-file", folder / "ssl") as server:
        yield server.grpc_url("m/versions/1").replace("grpc", "grpcs")


def test_grpc(mutual, pem):
    x = images(3)
    with Client(mutual, ca=pem / "ca.pem", **own(pem)) as client:
        np.testing.assert_allclose(client.predict(x)["logits"], expected(x)["logits"], atol=1e-5)
    for options in ({}, own(pem), {"ca": pem / "ca.pem"}):
        with Client(mutual, retries=0, **options) as client:
            with pytest.raises(ClientError, match="UNAVAILABLE"):
                client.status()
    with Client(mutual.replace("grpcs", "grpc"), retries=0) as client:
        with pytest.raises(ClientError, match="UNAVAILABLE"):
            client.status()


@pytest.fixture(scope="module")
def https(pem):
    """A server that gives metadata to those with a certificate: its URL."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            text = json.dumps(METADATA).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        def log_message(self, *arguments):
            pass

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pem / "server.pem", pem / "server.key")
    context.load_verify_locations(pem / "ca.pem")
    context.verify_mode = ssl.CERT_REQUIRED
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    server.handle_error = lambda *arguments: None
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    yield f"https://127.0.0.1:{server.server_address[1]}/v1/models/m"
    server.shutdown()
    server.server_close()
    thread.join(10)


def test_https(https, pem, monkeypatch):
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(pem / "server.pem"))  # what is given wins
    with Client(https, ca=pem / "ca.pem", **own(pem)) as client:
        assert client.metadata().version == 7
    with Client(https, **own(pem)) as client:
        # A certificate that nobody vouches for: asking again would not help.
        with pytest.raises(ClientError, match=r"no answer: TLS: .*verify failed") as raised:
            client.metadata()
        assert not raised.value.retryable and not raised.value.temporary
    with Client(https, ca=pem / "ca.pem", retries=0) as client, pytest.raises(ClientError):
        client.metadata()


@pytest.mark.parametrize("field", ["ca", "certificate", "key"])
def test_files_that_are_not_there(https, mutual, pem, field):
    for url in (https, mutual):
        options = {"ca": pem / "ca.pem", **own(pem), field: pem / "none.pem"}
        with Client(url, **options) as client, pytest.raises(UserError, match=r"TLS: .*none\.pem"):
            client.metadata()
