"""Training with a learned maximizer, taking it up again, and attacking with it."""

import json
import shutil
from types import SimpleNamespace

import keras
import numpy as np
import pytest
import yaml

from keras_emr.maximizers.files import load_maximizer
from tests.cli.harness import TINY, assert_error, call, history, shell, snapshot, write_data

pytestmark = pytest.mark.usefixtures("warm_keras")


@pytest.fixture(scope="module")
def learned(data, tmp_path_factory):
    """A run of RNN-Adv with 3 attack steps and two warm-up batches."""
    folder = tmp_path_factory.mktemp("learned")
    arguments = [
        *("train", *TINY, "--data", data, "--defense", "at", "--attack", "lstm", "--steps", 3),
        *("--epsilon", "0.1", "--emr", 0.01, "--maximizer-warmup", 2, "--hidden", 4),
        *("--out", "one", "--json"),
    ]
    result = shell(*arguments, cwd=folder)
    assert result.code == 0, result.err
    return SimpleNamespace(path=folder / "one", result=result)


def maximizer(path):
    return load_maximizer(path / "maximizer.keras")


def evaluate(capfd, *arguments):
    quick = (
        "--json",
        "--quiet",
        "--restarts",
        1,
        "--extra-examples",
        0,
        "--out",
        "r",
        "--overwrite",
    )
    result = call(capfd, "evaluate", *arguments, *quick)
    assert result.code == 0, result.err
    return json.loads(result.out), result.err


def test_a_run_keeps_its_maximizer(learned):
    kept = maximizer(learned.path)
    facts = {"epsilon": 0.1, "channels": 1, "steps": 3, "latent": False}
    assert kept.trained_for == facts and kept.hidden == 4 and kept.cell == "lstm"
    assert kept.count_params() == 4 * (4 + 16) + 4
    (row,) = history(learned.path)
    assert row["inner_loss"] > 0 and row["skipped_updates"] == 0
    assert row["val_learned_loss"] > 0 and row["val_referee_loss"] > 0
    assert json.loads(learned.result.out)["results"][0]["model"] == "at + lstm + EMR"


def test_warm_up_and_training_move_it(learned):
    fresh = type(maximizer(learned.path))("lstm", hidden=4)
    moved = [
        np.abs(keras.ops.convert_to_numpy(a - b)).max()
        for a, b in zip(maximizer(learned.path).variables, fresh.variables, strict=True)
    ]
    # Two batches of warm-up and three of an epoch; a step of Adam is at most about 0.01.
    assert max(moved) > 0.025


def test_more_steps_and_other_attacks(learned, capfd):
    told, _ = evaluate(
        capfd, learned.path, "--attacks", "learned,apgd,line-search", "--times", "1,4", "--steps", 3
    )
    names = ["lstm-3x1", "lstm-12x1", "apgd-3x1", "line-search-3x1"]
    assert [a["name"] for a in told["attacks"]] == names
    assert [a["options"]["steps"] for a in told["attacks"]] == [3, 12, 3, 3]
    assert told["attacks"][0]["options"]["maximizer"]["parameters"] == 84
    assert max(entry["perturbation"] for entry in told["gallery"]) <= 0.1 + 1e-6


def test_transfer_to_another_model_and_epsilon(learned, run, capfd):
    told, err = evaluate(capfd, run.path, "--attacks", "learned", "--maximizer", learned.path)
    assert err == "Warning: the maximizer was trained for epsilon 0.1, not 0.0313725\n"
    assert told["attacks"][0]["options"]["epsilon"] == 8 / 255


def test_other_channels_are_warned_of(learned, tmp_path, capfd):
    write_data(tmp_path / "colour.npz", shape=(8, 8, 3))
    arguments = [*TINY, "--data", "colour.npz", "--defense", "at", "--attack", "lstm"]
    arguments += ["--epsilon", "0.1", "--maximizer", learned.path, "--out", "taken"]
    result = call(capfd, "train", *arguments, "--maximizer-update", "frozen", "--quiet")
    assert result.code == 0
    assert result.err == "Warning: the maximizer was trained for 1 channels, not 3\n"
    kept = yaml.safe_load((tmp_path / "taken" / "config.yaml").read_text())["maximizer"]
    assert kept == str(learned.path.resolve())
    for a, b in zip(
        maximizer(learned.path).variables, maximizer(tmp_path / "taken").variables, strict=True
    ):
        np.testing.assert_array_equal(*map(keras.ops.convert_to_numpy, (a, b)))


@pytest.mark.slow
def test_a_resumed_run_equals_an_uninterrupted_one(data, tmp_path, capfd):
    flags = [*TINY, "--data", data, "--defense", "trades", "--attack", "rnn", "--quiet"]
    assert call(capfd, "train", *flags, "--epochs", 2, "--out", "whole").code == 0
    assert call(capfd, "train", *flags, "--epochs", 1, "--out", "halves").code == 0
    result = call(capfd, "train", "--out", "halves", "--resume", "--epochs", 2, "--quiet")
    assert result.code == 0, result.err
    assert history("halves") == history("whole")


BAD = [
    (["--attack", "lstm", "--steps", "0"], ["--steps", "'0'", ">= 1"]),
    (["--attack", "gru"], ["unknown attack", "'gru'", "lstm"]),
    (["--attack", "lstm", "--preprocessing", "cube"], ["preprocessing", "'cube'", "rms"]),
    (["--attack", "lstm", "--norm", "l2"], ["linf ball", "norm='l2'"]),
    (["--attack", "lstm", "--hidden", "0"], ["--hidden", "'0'"]),
    (["--attack", "lstm", "--maximizer", "nowhere"], ["maximizer not found", "'nowhere'"]),
    (["--attack", "pgd", "--maximizer", "x"], ["only a trained attack", "attack='pgd'"]),
    (["--attack", "fgsm", "--defense", "trades"], ["gradient of the KL", "start='none'"]),
]


@pytest.mark.parametrize("flags, fragments", BAD)
def test_bad_input_fails_before_training(flags, fragments, data, tmp_path, capfd):
    before = snapshot(tmp_path)
    result = call(capfd, "train", *TINY, "--data", data, *flags, "--out", "new", "--quiet")
    assert_error(result, 3, *fragments)
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("attack", ["rnn", "generator-gradient"])
def test_a_maximizer_of_another_kind(attack, learned, data, tmp_path, capfd):
    flags = ["--defense", "at", "--attack", attack, "--maximizer", learned.path]
    result = call(capfd, "train", *TINY, "--data", data, *flags, "--out", "new", "--quiet")
    assert_error(result, 3, "made for another attack", "a lstm", f"attack {attack}")


@pytest.mark.parametrize("content", ["text", "model", "missing"])
def test_a_checkpoint_that_is_not_a_maximizer(content, learned, tmp_path, capfd):
    shutil.copytree(learned.path, tmp_path / "run")
    file = tmp_path / "run" / "maximizer.keras"
    if content == "text":
        file.write_text("not an archive")
    elif content == "model":
        shutil.copy(learned.path / "best.keras", file)
    else:
        file.unlink()
    result = call(capfd, "evaluate", "run", "--attacks", "learned", "--quiet")
    said = {"text": "cannot load the maximizer", "model": "not a maximizer"}
    assert_error(result, 3, said.get(content, "maximizer not found"), "Received: ")


def test_times_must_be_at_least_one(learned, capfd):
    result = call(capfd, "evaluate", learned.path, "--attacks", "learned", "--times", "2,0")
    assert_error(result, 3, "--times", "'2,0'", ">= 1")


def test_the_preprocessings_are_the_librarys():
    from keras_emr.maximizers import preprocessing
    from keras_emr_cli.attack_settings import PREPROCESSINGS

    assert PREPROCESSINGS == preprocessing.PREPROCESSINGS
