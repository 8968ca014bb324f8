"""``--preset``: other defaults, below everything that anybody gave."""

import json
from pathlib import Path

import pytest
import yaml

from keras_emr_cli.presets import PRESETS
from keras_emr_cli.settings import merge
from keras_emr_cli.train_settings import TRAIN
from tests.cli.harness import TINY, assert_error, call


def settings(environment=None, **flags):
    return merge(TRAIN, flags, None, environment or {}, PRESETS)


def test_fast_gives_defaults_only():
    fast = settings(preset="fast")
    assert (fast.steps, fast.epochs, fast.averaging, fast.learn_share) == (4, 15, "ema", 0.25)
    assert (fast.learning_rate, fast.origins["learning_rate"]) == (0.003, "preset")
    chosen = settings({"KERAS_EMR_EPOCHS": "7"}, preset="fast", steps="9")
    assert (chosen.steps, chosen.epochs, chosen.lr_schedule) == (9, 7, "cyclic")
    assert (chosen.origins["steps"], chosen.origins["epochs"]) == ("flag", "environment")


def test_sgd_keeps_its_own_rate():
    assert settings(preset="fast", optimizer="sgd").learning_rate is None


def test_none_changes_nothing():
    assert settings().values == settings(preset="none").values
    assert set(settings().origins.values()) == {"default"}


def test_every_value_of_a_preset_is_one_that_the_option_takes():
    known = {setting.name: setting for setting in TRAIN}
    for name, preset in PRESETS.items():
        merged = settings(preset=name)
        assert set(preset) <= set(known)
        assert all(merged.origins[key] == "preset" for key in preset)


def test_config_show_names_the_origin(capfd):
    shown = json.loads(call(capfd, "config", "show", "--json", "--preset", "fast").out)
    assert shown["steps"] == {"value": 4, "origin": "preset"}
    assert shown["val_steps"]["origin"] == "default"


def test_an_unknown_preset_is_refused(capfd):
    assert_error(call(capfd, "train", "--preset", "fsat", "--out", "run"), 3, "'fsat'", "'fast'")


def test_it_cannot_be_searched(capfd, tmp_path):
    space = tmp_path / "space.yaml"
    space.write_text("preset: [none, fast]\n")
    assert_error(call(capfd, "tune", "--space", space), 3, "preset", "search those")


@pytest.mark.usefixtures("warm_keras")
def test_a_run_keeps_what_it_came_to(capfd, data):
    words = ["train", *TINY, "--data", data, "--quiet", "--out", "run", "--preset", "fast"]
    done = call(capfd, *words)
    assert done.code == 0, done.err
    config = yaml.safe_load(Path("run/config.yaml").read_text())
    assert (config["preset"], config["averaging"]) == ("fast", "ema")
    done = call(capfd, "train", "--resume", "--out", "run", "--quiet")
    assert done.code == 0, done.err
