"""A run with a model of one's own and everything that training offers, and its resumption."""

import json
from pathlib import Path

import numpy as np
import pytest
import yaml

from tests.builders import assert_same_arrays, newest_checkpoint
from tests.cli.harness import TINY, assert_error, call, history, weights

pytestmark = pytest.mark.usefixtures("warm_keras")

SOURCE = """
import keras

def tiny(input_shape, classes, activation="relu"):
    layers = [keras.layers.Flatten(), keras.layers.Dense(8), keras.layers.BatchNormalization()]
    layers += [keras.layers.Activation(activation), keras.layers.Dense(classes)]
    return keras.Sequential([keras.Input(input_shape), *layers])
"""
EXTRAS = (
    *("--model", "networks_of_mine:tiny", "--activation", "silu", "--optimizer", "sgd"),
    *("--learning-rate", "0.1", "--lr-schedule", "steps", "--lr-epochs", "2,3", "--nesterov"),
    *("--weight-decay", "1e-3", "--weight-decay-of", "kernels", "--clip-norm", "1"),
    *("--label-smoothing", "0.1", "--averaging", "ema", "--averaging-decay", "0.5"),
    *("--awp", "0.01", "--awp-warmup", "1", "--epsilon-warmup", "2", "--early-stopping", "9"),
)


@pytest.mark.slow
def test_a_run_with_everything_resumes_exactly(capfd, tmp_path, data):
    Path("networks_of_mine.py").write_text(SOURCE)
    train = ["train", *TINY, "--data", data, *EXTRAS, "--quiet"]
    for out, epochs in (("a", 3), ("b", 1)):
        result = call(capfd, *train, "--epochs", epochs, "--out", out)
        assert result.code == 0, result.err
    result = call(capfd, "train", "--resume", "--out", "b", "--epochs", 3, "--quiet", "--json")
    assert result.code == 0, result.err
    assert history("a") == history("b") and len(history("a")) == 3
    for name in ("last.keras", "best.keras"):
        for a, b in zip(weights(f"a/{name}"), weights(f"b/{name}"), strict=True):
            np.testing.assert_array_equal(a, b)
    (_, one), (_, other) = newest_checkpoint("a"), newest_checkpoint("b")
    assert_same_arrays(one, other)
    # What is kept for use is the average, not what training goes on from.
    kernel = next(w for w in weights("a/last.keras") if w.ndim == 2)
    same = [name for name, value in one.items() if np.array_equal(value, kernel)]
    assert len(same) == 1  # the average itself
    assert json.loads(result.out)["settings"]["model"] == "networks_of_mine:tiny"
    assert yaml.safe_load(Path("a/config.yaml").read_text())["awp"] == 0.01


def test_a_file_as_a_model_goes_on_from_its_weights(capfd, tmp_path, run, data):
    start = run.path / "last.keras"
    train = [
        "train",
        *TINY,
        "--data",
        data,
        "--quiet",
        "--learning-rate",
        "1e-12",
        "--model",
        start,
    ]
    result = call(capfd, *train)
    assert result.code == 0, result.err
    (folder,) = Path("runs").iterdir()
    assert folder.name == "toy-last-trades-emr"
    for a, b in zip(weights(start), weights(folder / "last.keras"), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


def test_a_schedule_of_so_many_epochs_takes_no_more(capfd, tmp_path, data):
    train = ["train", *TINY, "--data", data, "--out", "run", "--lr-schedule", "cosine", "--quiet"]
    assert call(capfd, *train).code == 0
    result = call(capfd, "train", "--out", "run", "--resume", "--epochs", 2)
    assert_error(result, 3, "epochs", "Received: 2", "the run has 1")


def test_the_guard_ends_a_run_with_one_line(capfd, monkeypatch, data):
    from keras_emr.training import experiment
    from keras_emr.training.callbacks import CatastrophicOverfitting

    given = {}

    def collapse(*arguments, **options):
        given.update(options)
        raise CatastrophicOverfitting("catastrophic overfitting: as told.")

    monkeypatch.setattr(experiment, "train", collapse)
    single = ["--attack", "fast-fgsm", "--early-stopping", 3, "--quiet"]
    result = call(capfd, "train", *TINY, "--data", data, *single, "--out", "run")
    assert_error(result, 1, "catastrophic overfitting: as told.", "no model was kept")
    assert (given["overfitting_guard"], given["patience"]) == (0.2, 3)


@pytest.mark.parametrize(
    "method",
    [
        ("--defense", "lbgat", "--mixup", "0.4", "--cutmix", "1"),
        pytest.param(("--defense", "mma"), marks=pytest.mark.slow),
        pytest.param(("--defense", "free-at", "--replays", "2"), marks=pytest.mark.slow),
        pytest.param(("--defense", "at", "--head", "hypersphere"), marks=pytest.mark.slow),
    ],
)
def test_a_further_method_resumes_exactly(capfd, tmp_path, data, method):
    """Teacher, margins and perturbation are in the checkpoint; best.keras is the network alone."""
    train = ["train", *TINY, "--data", data, *method, "--quiet"]
    for out, epochs in (("a", 2), ("b", 1)):
        result = call(capfd, *train, "--epochs", epochs, "--out", out)
        assert result.code == 0, result.err
    result = call(capfd, "train", "--resume", "--out", "b", "--epochs", 2, "--quiet")
    assert result.code == 0, result.err
    assert history("a") == history("b") and len(history("a")) == 2
    (_, one), (_, other) = newest_checkpoint("a"), newest_checkpoint("b")
    assert_same_arrays(one, other)
    for a, b in zip(weights("a/last.keras"), weights("b/last.keras"), strict=True):
        np.testing.assert_array_equal(a, b)
    count = {"lbgat": 6, "mma": 6, "free-at": 6, "at": 5}[method[1]]
    assert len(weights("a/best.keras")) == count  # mlp: three layers
