"""Another project's client of TensorFlow Serving gets along with the development server."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.serving import image_model
from tests.serving.image_model import ServerProcess, expected, images

# Its requirements are not ours: it lives in an environment of its own, made from the registry.
PACKAGE = "ovmsclient==2023.1"


@pytest.fixture(scope="module")
def their_python(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ovmsclient") / "venv"
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    subprocess.run([folder / "bin" / "pip", "install", "-q", PACKAGE], check=True)
    return folder / "bin" / "python"


@pytest.fixture(scope="module")
def running(tmp_path_factory):
    with ServerProcess(image_model.build_store(tmp_path_factory.mktemp("images"))) as server:
        yield server


@pytest.mark.slow
@pytest.mark.parametrize("protocol", ["grpc", "http"])
def test_status_metadata_predictions_and_errors(their_python, running, tmp_path, protocol):
    x = images(7)
    np.save(tmp_path / "x.npy", x)
    port = running.grpc_port if protocol == "grpc" else running.rest_port
    worker = Path(__file__).with_name("ovmsclient_worker.py")
    done = subprocess.run(
        [their_python, worker, protocol, f"127.0.0.1:{port}", tmp_path / "x.npy"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    state = told["status"]["1"]
    assert (state["state"], state["error_code"]) == ("AVAILABLE", 0)
    metadata = told["metadata"]
    if protocol == "grpc":
        assert metadata["inputs"] == {"image": {"shape": [-1, 6, 5, 1], "dtype": "DT_FLOAT"}}
        assert sorted(metadata["outputs"]) == ["class_id", "logits", "probabilities"]
    else:  # as the server says it
        signatures = metadata["metadata"]["signature_def"]["signature_def"]
        assert signatures["serving_default"]["inputs"]["image"]["dtype"] == "DT_FLOAT"
        assert metadata["model_spec"]["version"] == "2"
    for version, scale in (("1", 1.0), ("2", 2.0)):
        got, wanted = told["predictions"][version], expected(x, scale)
        assert sorted(got) == ["class_id", "logits", "probabilities"]
        assert got["class_id"] == wanted["class_id"].tolist()
        np.testing.assert_allclose(got["logits"], wanted["logits"], atol=1e-4)
        np.testing.assert_allclose(got["probabilities"], wanted["probabilities"], atol=1e-4)
    # By the texts alone can that client tell these apart.
    for wrong, kind, text in (
        ("model", "ModelNotFoundError", "Specific(zz, 1)"),
        ("version", "ModelNotFoundError", "Specific(m, 3)"),
        ("shape", "InvalidInputError", "not compatible with expected shape [?,6,5,1]"),
        ("input", "InvalidInputError", "image"),
    ):
        assert told[f"wrong {wrong}"][0] == kind and text in told[f"wrong {wrong}"][1]
