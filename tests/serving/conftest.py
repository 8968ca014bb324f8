"""Models written once, and one server that most tests ask."""

import shutil
import subprocess

import pytest

from tests.serving import toy


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """Versions to copy into stores: ``toy``, ``small``, ``double``, ``conv``."""
    folder = tmp_path_factory.mktemp("made")
    toy.build(folder / "toy")
    toy.build_small(folder / "small")
    toy.build_small(folder / "double", scale=2.0)
    toy.build_conv(folder / "conv")
    return folder


@pytest.fixture(scope="session")
def store(made, tmp_path_factory):
    """A store with ``m`` (the recorded model) and ``conv``, version 1 each."""
    folder = tmp_path_factory.mktemp("store")
    for name, source in (("m", "toy"), ("conv", "conv")):
        (folder / name).mkdir()
        toy.publish(made / source, folder / name / "1")
    return folder


@pytest.fixture(scope="session")
def server(store):
    """A running server on free ports."""
    from keras_emr_serving.server.config import store_models
    from keras_emr_serving.server.server import Options, Server

    with Server(store_models(store), Options(rest_port=0, grpc_port=0)) as running:
        yield running


@pytest.fixture
def url(server):
    return f"http://127.0.0.1:{server.rest_port}"


@pytest.fixture(scope="session")
def pem(tmp_path_factory):
    """A folder with an authority, ``ca.pem``, and ``server``, ``client`` and their keys."""
    if shutil.which("openssl") is None:
        pytest.skip("needs openssl")
    folder = tmp_path_factory.mktemp("tls")

    def openssl(*arguments):
        done = subprocess.run(
            ["openssl", *map(str, arguments)], cwd=folder, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr

    key = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes")
    openssl(
        "req", "-x509", *key, "-days", 2, "-keyout", "ca.key", "-out", "ca.pem", "-subj", "/CN=ca"
    )
    (folder / "names").write_text("subjectAltName=IP:127.0.0.1")
    for name in ("server", "client"):
        openssl("req", *key, "-keyout", f"{name}.key", "-out", "request", "-subj", f"/CN={name}")
        signed = ("-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial", "-days", 2)
        openssl(
            "x509", "-req", "-in", "request", *signed, "-extfile", "names", "-out", f"{name}.pem"
        )
    return folder
