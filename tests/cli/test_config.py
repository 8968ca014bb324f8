"""Settings: where they come from, how they are written, and what is refused."""

import json
from fractions import Fraction

import pytest
import yaml

from keras_emr_cli.settings import Ratio, template
from keras_emr_cli.train_settings import TRAIN
from tests.cli.harness import assert_error, call

DEFAULTS = {s.name: s.default for s in TRAIN}


def show(capfd, *arguments):
    """``config show --json`` as ``{name: (value, origin)}``."""
    result = call(capfd, "config", "show", "--json", *arguments)
    assert (result.code, result.err) == (0, "")
    return {k: (row["value"], row["origin"]) for k, row in json.loads(result.out).items()}


def write(tmp_path, text):
    path = tmp_path / "settings.yaml"
    path.write_text(text)
    return path


def test_defaults(capfd):
    shown = show(capfd)
    expected = {k: "auto" if v is None else v for k, v in DEFAULTS.items()}
    expected["epsilon"] = 0.15
    assert {k: v for k, (v, _) in shown.items()} == expected
    assert {origin for _, origin in shown.values()} == {"default"}


def test_precedence_of_the_four_origins(capfd, tmp_path, monkeypatch):
    config = write(tmp_path, "epochs: 5\nsteps: 6\nseed: 7\nbaseline: false\n")
    monkeypatch.setenv("KERAS_EMR_STEPS", "8")
    monkeypatch.setenv("KERAS_EMR_SEED", "9")
    monkeypatch.setenv("KERAS_EMR_EMR_CENTER", "yes")
    shown = show(capfd, "--config", config, "--seed", "11", "--no-emr-central")
    assert shown["epochs"] == (5, "config")
    assert shown["steps"] == (8, "environment")
    assert shown["seed"] == (11, "flag")
    assert shown["batch_size"] == (64, "default")
    assert shown["baseline"] == (False, "config")
    assert shown["emr_center"] == (True, "environment")
    assert shown["emr_central"] == (False, "flag")


def test_a_flag_that_repeats_the_default_still_wins(capfd, tmp_path, monkeypatch):
    config = write(tmp_path, "epochs: 5\nbaseline: false\nbeta: 3\n")
    monkeypatch.setenv("KERAS_EMR_EPOCHS", "6")
    shown = show(capfd, "--config", config, "--epochs", "20", "--baseline", "--beta", "auto")
    assert shown["epochs"] == (20, "flag")
    assert shown["baseline"] == (True, "flag")
    assert shown["beta"] == ("auto", "flag")


def test_the_table_shows_value_and_origin(capfd):
    result = call(capfd, "config", "show", "--epsilon", "8/255")
    rows = [line.split() for line in result.out.splitlines()]
    assert ["epsilon", "8/255", "flag"] in rows
    assert ["backend", "tensorflow", "default"] in rows
    assert len(rows) == len(TRAIN)


def test_template_holds_exactly_the_defaults(capfd):
    written = call(capfd, "config", "init", "mine.yaml")
    assert (written.code, written.out) == (0, "")
    text = open("mine.yaml").read()
    assert text == template(TRAIN)
    assert call(capfd, "config", "init", "-").out == text
    loaded = yaml.safe_load(text)
    assert list(loaded) == list(DEFAULTS)
    from_file, default = show(capfd, "--config", "mine.yaml"), show(capfd)
    assert {k: v for k, (v, _) in from_file.items()} == {k: v for k, (v, _) in default.items()}
    assert {origin for _, origin in from_file.values()} == {"config"}
    # Every setting is explained.
    for setting in TRAIN:
        assert f"# {setting.help}" in text
        if setting.auto:
            assert f"#   auto: {setting.auto}" in text


def test_init_has_a_default_name_and_overwrites_nothing(capfd, tmp_path):
    assert call(capfd, "config", "init").code == 0
    path = tmp_path / "keras-emr.yaml"
    path.write_text("epochs: 3\n")
    assert_error(call(capfd, "config", "init"), 3, "exists", "keras-emr.yaml", "another name")
    assert path.read_text() == "epochs: 3\n"
    assert_error(call(capfd, "config", "init", "no/such/folder.yaml"), 3, "no/such/folder.yaml")


@pytest.mark.parametrize(
    ("text", "fragments"),
    [
        ("epochz: 3\n", ["'epochz'", "did you mean 'epochs'?", "settings.yaml"]),
        ("batch-sise: 3\n", ["'batch-sise'", "did you mean 'batch_size'?"]),
        ("3: 3\n", ["'3'", "epochs"]),
        ("epochs: [1\n", ["not valid YAML", "line 2", "settings.yaml"]),
        ("epochs: *missing\n", ["not valid YAML", "line 1"]),
        ("epochs: !!python/object/apply:os.getcwd []\n", ["not valid YAML", "line 1"]),
        ("seed: 2020-13-45\n", ["not valid YAML", "settings.yaml"]),
        ("- epochs\n- 3\n", ["`key: value`", "settings.yaml"]),
        ("just text\n", ["`key: value`", "settings.yaml"]),
        ("epochs: three\n", ["epochs", "'three'", "whole number >= 1"]),
        ("epochs: 2.5\n", ["epochs", "2.5", "whole number"]),
        ("epochs: true\n", ["epochs", "True", "whole number"]),
        ("epochs: [1]\n", ["epochs", "[1]", "whole number"]),
        ("epochs:\n", ["epochs", "nothing", "whole number"]),
        ("epsilon: -0.1\n", ["epsilon", "-0.1", "8/255"]),
        ("epsilon: .nan\n", ["epsilon", "nan", "8/255"]),
        ("epsilon: true\n", ["epsilon", "True", "8/255"]),
        ("learning_rate: 0\n", ["learning_rate", "0", "> 0"]),
        ("baseline: maybe\n", ["baseline", "'maybe'", "true or false"]),
        ("emr_decay_epochs: [1.7]\n", ["emr_decay_epochs", "1.7", "whole numbers"]),
        ("emr_decay_epochs: [a]\n", ["emr_decay_epochs", "a", "whole numbers"]),
        ("emr_decay_epochs: 1,x\n", ["emr_decay_epochs", "1,x", "whole numbers"]),
        ("defense: trade\n", ["defense", "'trade'", "did you mean 'trades'?"]),
    ],
)
def test_bad_config_files(capfd, tmp_path, text, fragments):
    config = write(tmp_path, text)
    for command in (["config", "show"], ["train", "--out", "run"]):
        assert_error(call(capfd, *command, "--config", config), 3, *fragments)
    assert list(tmp_path.iterdir()) == [config]


def test_unreadable_config_files(capfd, tmp_path):
    assert_error(call(capfd, "config", "show", "--config", "no.yaml"), 3, "no.yaml", "No such file")
    assert_error(call(capfd, "config", "show", "--config", tmp_path), 3, str(tmp_path), "directory")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    assert_error(call(capfd, "config", "show", "--config", "binary.yaml"), 3, "not a text file")


def test_an_empty_config_file_changes_nothing(capfd, tmp_path):
    assert show(capfd, "--config", write(tmp_path, "# nothing\n")) == show(capfd)


def test_keys_may_be_written_like_flags(capfd, tmp_path):
    shown = show(capfd, "--config", write(tmp_path, "batch-size: 3\n"))
    assert shown["batch_size"] == (3, "config")


@pytest.mark.parametrize(
    ("written", "shown", "value"),
    [
        ("8/255", "8/255", 8 / 255),
        ("0.031", 0.031, 0.031),
        ("1e-3", 0.001, 0.001),
        ("0", 0.0, 0.0),
        (" 4/255 ", "4/255", 4 / 255),
    ],
)
def test_epsilon_is_shown_as_it_was_written(capfd, tmp_path, monkeypatch, written, shown, value):
    assert float(Ratio(written)) == value
    assert show(capfd, f"--epsilon={written}")["epsilon"] == (shown, "flag")
    monkeypatch.setenv("KERAS_EMR_EPSILON", written)
    assert show(capfd)["epsilon"] == (shown, "environment")
    monkeypatch.delenv("KERAS_EMR_EPSILON")
    # `1e-3` is text for YAML 1.1, `0.031` a number.
    config = write(tmp_path, f"epsilon: {written}\n")
    assert show(capfd, "--config", config)["epsilon"] == (shown, "config")


def test_ratios_are_exact():
    assert float(Ratio("8/255")) == float(Fraction(8, 255)) == 8 / 255
    assert str(Ratio("8/255")) == "8/255"


BAD_RATIOS = ["-0.1", "-8/255", "8/-255", "8/0", "8/", "/255", "8/255/1", "eight", "", "nan", "inf"]
BAD_RATIOS += ["-inf", "1e999", "0x1", "nan/2", "8%", "1" + "0" * 400 + "/1"]


@pytest.mark.parametrize("written", BAD_RATIOS, ids=lambda text: text[:12])
def test_bad_epsilon(capfd, monkeypatch, written):
    result = call(capfd, "config", "show", f"--epsilon={written}")
    assert_error(result, 3, "--epsilon:", f"Received: {written!r}", "8/255 >= 0")
    monkeypatch.setenv("KERAS_EMR_EPSILON", written)
    result = call(capfd, "config", "show")
    assert_error(result, 3, "KERAS_EMR_EPSILON:", f"Received: {written!r}", "8/255 >= 0")


def test_step_size_may_be_auto_but_epsilon_may_not(capfd):
    for word in ("auto", "AUTO"):
        assert show(capfd, "--step-size", word)["step_size"] == ("auto", "flag")
    assert show(capfd, "--step-size", "2/255")["step_size"] == ("2/255", "flag")
    assert_error(call(capfd, "config", "show", "--epsilon", "auto"), 3, "--epsilon", "'auto'")


@pytest.mark.parametrize(
    ("word", "value"),
    [("true", True), ("1", True), ("YES", True), ("false", False), ("0", False), ("No", False)],
)
def test_booleans_from_the_environment(capfd, monkeypatch, word, value):
    monkeypatch.setenv("KERAS_EMR_BASELINE", word)
    assert show(capfd)["baseline"] == (value, "environment")


@pytest.mark.parametrize(
    ("name", "written", "expected"),
    [
        ("BASELINE", "maybe", "true or false"),
        ("BASELINE", "", "true or false"),
        ("EPOCHS", "0", "whole number >= 1"),
        ("EPOCHS", "-3", "whole number >= 1"),
        ("EPOCHS", "1.5", "whole number >= 1"),
        ("EPOCHS", "", "whole number >= 1"),
        ("EPOCHS", "auto", "whole number >= 1"),
        ("SEED", "-1", "whole number >= 0"),
        ("EMR", "-0.01", "number >= 0"),
        ("EMR", "nan", "number >= 0"),
        ("EMR", "1/3", "number >= 0"),
        ("LEARNING_RATE", "0", "number > 0"),
        ("LEARNING_RATE", "inf", "number > 0"),
        ("BETA", "much", "number >= 0, or auto"),
        ("EMR_DECAY_EPOCHS", "75;90", "whole numbers separated by commas, or auto"),
    ],
)
def test_bad_values_name_the_variable_or_the_flag(capfd, monkeypatch, name, written, expected):
    flag = "--" + name.lower().replace("_", "-")
    monkeypatch.setenv(f"KERAS_EMR_{name}", written)
    result = call(capfd, "config", "show")
    assert_error(result, 3, f"KERAS_EMR_{name}:", f"Received: {written!r}", expected)
    monkeypatch.delenv(f"KERAS_EMR_{name}")
    if name != "BASELINE":
        result = call(capfd, "config", "show", f"{flag}={written}")
        assert_error(result, 3, f"{flag}:", f"Received: {written!r}", expected)


def test_lists_of_epochs(capfd, tmp_path):
    assert show(capfd, "--emr-decay-epochs", "75, 90")["emr_decay_epochs"] == ([75, 90], "flag")
    config = write(tmp_path, "emr_decay_epochs: [75, 90]\n")
    assert show(capfd, "--config", config)["emr_decay_epochs"] == ([75, 90], "config")
