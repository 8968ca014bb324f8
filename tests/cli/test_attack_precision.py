"""``--attack-precision``: used, kept in ``config.yaml``, and refused in one line."""

from pathlib import Path

import pytest
import yaml

from keras_emr.network import passes
from tests.cli.harness import TINY, assert_error, call, history

pytestmark = pytest.mark.usefixtures("warm_keras")


def test_training_attacks_in_bfloat16_and_the_run_says_so(capfd, monkeypatch, data):
    used, precision = [], passes.precision
    monkeypatch.setattr(
        passes, "precision", lambda layers, name: used.append(name) or precision(layers, name)
    )
    train = ["train", *TINY, "--data", data, "--quiet", "--out", "run"]
    done = call(capfd, *train, "--attack-precision", "bfloat16")
    assert done.code == 0, done.err
    assert {"bfloat16", "float32"} == set(used)
    config = yaml.safe_load(Path("run/config.yaml").read_text())
    assert config["attack_precision"] == "bfloat16" and config["precision"] == "float32"
    used.clear()
    done = call(capfd, "train", "--resume", "--out", "run", "--epochs", 2, "--quiet")
    assert done.code == 0, done.err
    assert "bfloat16" in used and len(history("run")) == 2


def test_unless_told_so_nothing_is_in_bfloat16(capfd):
    done = call(capfd, "config", "show", "--json")
    assert done.code == 0 and '"float32"' in done.out and "bfloat16" not in done.out


@pytest.mark.parametrize("value", ["float16", "mixed_bfloat16"])
def test_other_precisions_are_refused(capfd, data, value):
    words = ("train", *TINY, "--data", data, "--attack-precision", value, "--out", "run")
    assert_error(call(capfd, *words), 3, "--attack-precision", repr(value), "float32, bfloat16")
    assert not Path("run").exists()
