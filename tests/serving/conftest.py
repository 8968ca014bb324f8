"""Models written once, and one server that most tests ask."""

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
