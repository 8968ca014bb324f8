"""One tiny data file and one tiny run, shared by every test of the command line."""

import os
from types import SimpleNamespace

import pytest

from keras_emr.data import scan_cache
from tests.cli.harness import TINY, shell, write_data
from tests.serving import image_model


@pytest.fixture(autouse=True)
def isolated(tmp_path, monkeypatch):
    """An empty working directory, no KERAS_EMR_ variables, and the environment restored."""
    before = dict(os.environ)
    for name in before:
        if name.startswith("KERAS_EMR_"):
            del os.environ[name]
    monkeypatch.chdir(tmp_path)
    scans = tmp_path.parent / f"{tmp_path.name}-scans"  # not the user's cache
    monkeypatch.setattr(scan_cache, "cache_folder", lambda: scans)
    yield
    for name in set(os.environ) - set(before):
        del os.environ[name]
    os.environ.update(before)


@pytest.fixture(scope="session")
def warm_keras():
    """Import keras and touch its device now, so that no test captures what that prints."""
    import keras

    keras.ops.zeros(())


@pytest.fixture(scope="session")
def running(tmp_path_factory):
    """A server process with the models of ``image_model.build_store``; nobody changes it."""
    config = image_model.build_store(tmp_path_factory.mktemp("images"))
    with image_model.ServerProcess(config) as server:
        yield server


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """Path of an .npz file: 60 + 20 images 8x8x1, 2 classes."""
    return write_data(tmp_path_factory.mktemp("data") / "toy.npz")


@pytest.fixture(scope="session")
def jax_cache(tmp_path_factory):
    """Environment with a cache of compiled programs, as users may have: saves JAX a minute."""
    return {
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path_factory.mktemp("jax-cache")),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }


@pytest.fixture(scope="session")
def run(data, tmp_path_factory):
    """A finished run of two epochs and its baseline, trained by a process with ``--json``."""
    folder = tmp_path_factory.mktemp("run")
    arguments = [
        *("train", *TINY, "--data", data, "--epochs", 2, "--epsilon", "8/255", "--seed", 7),
        *("--baseline", "--out", "toy-run", "--json"),
    ]
    result = shell(*arguments, cwd=folder)
    assert result.code == 0, result.err
    return SimpleNamespace(path=folder / "toy-run", result=result, arguments=arguments)
