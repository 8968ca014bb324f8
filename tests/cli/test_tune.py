"""``tune``: what it refuses, what it finds, and that it goes on whoever is killed."""

import csv
import importlib.util
import json

import pytest
import yaml

from keras_emr_cli.tune_settings import TUNE
from keras_emr_cli.tune_space import EXAMPLE, read_space
from tests.cli.harness import assert_error, call, snapshot

pytestmark = pytest.mark.usefixtures("warm_keras")

SPACE = """
defense: [at, trades]
learning_rate: {type: float, low: 0.001, high: 0.02, sampling: log}
beta: {type: float, low: 1, high: 8, when: {defense: [trades]}}
"""
# The smallest search there is.
SMALL = ("--model", "mlp", "--epochs", 2, "--steps", 1, "--prune-steps", 1, "--batch-size", 16)
SMALL += ("--eval-steps", 2, "--eval-restarts", 1, "--emr", 0, "--finalists", 1)


@pytest.fixture
def space(tmp_path):
    path = tmp_path / "space.yaml"
    path.write_text(SPACE)
    return path


@pytest.mark.parametrize(
    ("text", "fragments"),
    [
        ("learning_rat: [1]", ["parameter", "'learning_rat'", "did you mean 'learning_rate'"]),
        ("learning_rate: [0.1, -1]", ["learning_rate", "-1", "a number > 0"]),
        ("momentum: {type: float, low: 0.5, high: 2}", ["momentum: high", "2", "<= 1"]),
        ("epochs: {type: int, low: 0, high: 3}", ["epochs: low", "0", ">= 1"]),
        ("steps: {type: float, low: 1, high: 3}", ["steps", "type: float", "type: int"]),
        ("beta: {type: int, low: 1, high: 3}", ["beta", "type: int", "a list of values"]),
        ("defense: {type: float, low: 1, high: 3}", ["defense", "a list of values"]),
        ("defense: [at, trade]", ["'trade'", "did you mean 'trades'"]),
        ("defense: at", ["defense", "'at'", "--defense"]),
        ("defense: []", ["defense", "a list of values"]),
        ("defense: [at, at]", ["defense", "twice"]),
        ("beta: {type: float, low: 3, high: 3}", ["beta", "low must be below high"]),
        ("beta: {type: float, low: 3}", ["beta", "no high"]),
        ("beta: {type: float, low: 0, high: 3, sampling: log}", ["beta", "low > 0"]),
        ("beta: {type: float, low: 1, high: 3, sampling: lg}", ["'lg'", "log"]),
        ("beta: {type: float, low: 1, high: 3, step: 0}", ["beta: bad step", "0", "> 0"]),
        ("steps: {type: int, low: 1, high: 9, step: 1.5}", ["bad step", "1.5", "whole"]),
        ("beta: {type: float, lo: 1, high: 3}", ["'lo'", "did you mean 'low'"]),
        ("beta: {type: floot, low: 1, high: 3}", ["'floot'", "did you mean 'float'"]),
        ("beta: {type: float, values: [1]}", ["beta", "has no values"]),
        ("beta: {values: [1], when: {defense: [at]}}", ["when", "'defense'"]),
        ("defense: [at]\nbeta: {values: [1], when: {defense: [mart]}}", ["'mart'", "at"]),
        ("defense: [at]\nbeta: {values: [1], when: at}", ["bad when", "'at'"]),
        (
            "defense: {values: [at], when: {beta: [1]}}\nbeta: {values: [1], when: {defense: at}}",
            ["circle"],
        ),
        ("seed: [1]\nSEED: [1]", ["'SEED'", "did you mean 'seed'"]),
        ("lr-factor: [1]\nlr_factor: [1]", ["twice", "lr_factor"]),
        ("data: [digits]", ["data cannot be searched", "same validation data"]),
        ("backend: [jax]", ["backend cannot be searched"]),
        ("- defense", ["option: values"]),
        ("defense: [at", ["not valid YAML"]),
        ("", ["option: values", "keras-emr config space"]),
    ],
)
def test_a_bad_space_is_one_line_and_nothing_is_written(capfd, tmp_path, text, fragments):
    (tmp_path / "space.yaml").write_text(text)
    before = snapshot(tmp_path)
    result = call(capfd, "tune", "--space", "space.yaml", "--out", "search")
    assert_error(result, 3, *fragments)
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize(
    ("flags", "code", "fragments"),
    [
        (["--beta", 3], 3, ["beta", "both fixed and searched", "3", "flag"]),
        (["--search", "grid"], 3, ["'grid'", "random, bayesian, hyperband"]),
        (["--objective", "robust_accuracy"], 3, ["did you mean 'val_robust_accuracy'"]),
        (["--max-trials", 0], 3, ["--max-trials", ">= 1"]),
        (["--max-trials", 2, "--workers", 3], 3, ["--workers", "3 for 2 trials"]),
        (["--space", "none.yaml"], 3, ["'none.yaml'", "No such file"]),
        (["--chief", "host"], 3, ["--chief", "HOST:PORT"]),
        (["--tuner-id", "a"], 2, ["--tuner-id needs --chief"]),
        (["--resume"], 2, ["--resume needs --out"]),
        (["--resume", "--out", "nothing"], 3, ["no search to resume", "'nothing'"]),
        (["--overwrite", "--out", "."], 3, ["refusing to overwrite"]),
        (["--out", "."], 3, ["the folder is not empty"]),
        (["--val-steps", 3], 2, ["--val-steps"]),
        (["--out", "s", "--chief", "h:1", "--tuner-id", "a"], 3, ["--space", "a worker has"]),
        (["--label-smoothing", 0.1, "--defense", "mart", "--space", "lr.yaml"], 3, ["mart"]),
        (["--search", "hyperband", "--space", "epochs.yaml"], 3, ["hyperband itself", "epochs"]),
        (["--space", "epsilon.yaml"], 3, ["--judge-epsilon", "one ball"]),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else None,
)
def test_what_contradicts_itself_is_one_line(capfd, tmp_path, space, data, flags, code, fragments):
    (tmp_path / "lr.yaml").write_text("learning_rate: [0.1, 0.2]")
    (tmp_path / "epochs.yaml").write_text("epochs: [1, 2]")
    (tmp_path / "epsilon.yaml").write_text("epsilon: [0.1, 8/255]")
    before = snapshot(tmp_path)
    result = call(capfd, "tune", "--space", space, "--data", data, *SMALL, *flags)
    assert_error(result, code, *fragments)
    assert snapshot(tmp_path) == before


def test_an_environment_variable_fixes_as_a_flag_does(capfd, space, monkeypatch):
    monkeypatch.setenv("KERAS_EMR_BETA", "3")
    assert_error(call(capfd, "tune", "--space", space), 3, "beta", "both", "environment variable")


@pytest.mark.parametrize("missing", ["keras_tuner", "tensorboard", "sklearn"])
def test_a_missing_package_is_said_before_anything(capfd, space, monkeypatch, missing):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == missing else find(name)
    )
    result = call(capfd, "tune", "--space", space, "--search", "bayesian")
    assert_error(result, 3, missing.replace("_", "-"), "pip install 'keras-emr[tune]'")


def test_the_example_is_a_space(capfd, tmp_path):
    shown = call(capfd, "config", "space")
    assert (shown.code, shown.err, shown.out) == (0, "", EXAMPLE)
    (tmp_path / "s.yaml").write_text(EXAMPLE)
    found, text = read_space(str(tmp_path / "s.yaml"))
    assert text == EXAMPLE
    by_name = {parameter.name: parameter for parameter in found}
    assert set(by_name) == set(yaml.safe_load(EXAMPLE))
    assert by_name["label_smoothing"].values == ("0", "0.1", "0.2")
    assert by_name["beta"].when == {"defense": ("trades",)}
    assert (by_name["batch_size"].step, by_name["batch_size"].sampling) == (2, "log")


def test_what_a_search_sets_itself_is_no_option():
    assert not {"val_steps", "baseline"} & {setting.name for setting in TUNE}


def outcome(folder):
    """What does not depend on the clock or the folder's name."""
    report = json.loads((folder / "results.json").read_text())
    for trial in report["trials"]:
        del trial["seconds"], trial["run"]
    return {key: report[key] for key in ("trials", "pareto", "winner")}


@pytest.mark.slow
def test_a_search_that_is_interrupted_goes_on_to_the_same_table(
    capfd, tmp_path, data, space, monkeypatch
):
    """In the second epoch of the second trial."""
    from keras_emr.training.callbacks import Interrupted, StopOnNonFinite

    arguments = ["tune", "--space", space, "--data", data, *SMALL, "--tensorboard"]
    whole = call(capfd, *arguments, "--max-trials", 2, "--out", "whole")
    assert whole.code == 0, whole.err

    begun = []

    def interrupt(self, epoch, logs=None):
        begun.append(epoch)
        if len(begun) == 4:
            raise Interrupted(15)

    with monkeypatch.context() as patch:
        patch.setattr(StopOnNonFinite, "on_epoch_begin", interrupt)
        stopped = call(capfd, *arguments, "--max-trials", 2, "--out", "parts", "--quiet")
    assert_error(stopped, 75, "SIGTERM", "keras-emr tune --out parts --resume")
    assert begun == [0, 1, 0, 1] and not (tmp_path / "parts" / "results.json").exists()

    assert_error(call(capfd, *arguments, "--out", "parts"), 3, "not empty", "--resume")
    resume = ["tune", "--out", "parts", "--resume"]
    other = call(capfd, *resume, "--learning-rate", 0.1)
    assert_error(other, 3, "learning_rate: both fixed and searched")
    assert_error(call(capfd, *resume, "--epochs", 9), 3, "epochs: a resumed search keeps")

    resumed = call(capfd, *resume, "--json")
    assert resumed.code == 0, resumed.err
    assert resumed.err.count("epoch 2/2") == 1 and "epoch 1/2" not in resumed.err
    assert outcome(tmp_path / "parts") == outcome(tmp_path / "whole")

    report = json.loads(resumed.out)
    assert report == json.loads((tmp_path / "parts" / "results.json").read_text())
    assert report["cheap_attack"] == "PGD-1x1" and report["strong_attack"] == "PGD-2x1"
    assert [trial["status"] for trial in report["trials"]] == ["completed"] * 2
    best = report["trials"][0]
    assert best["trial"] == report["winner"]
    assert best["strong_minus_cheap"] == best["strong_robust"] - best["robust"]
    assert report["trials"][1]["strong_robust"] is None  # one finalist
    with open("parts/results.csv", newline="") as file:
        first = next(csv.DictReader(file))
    assert first["trial"] == best["trial"] and float(first["robust"]) == best["robust"]
    assert first["defense"] == best["values"]["defense"]
    assert (tmp_path / "parts" / "pareto.png").read_bytes().startswith(b"\x89PNG")
    for text in ("difference", "PGD-2x1", "best: whole/trials", "keras-emr evaluate whole/trials"):
        assert text in whole.out

    check_tensorboard(tmp_path / "parts" / "trials" / best["trial"], best)
    # A trial is a run like any other.
    again = yaml.safe_load((tmp_path / "parts/trials/0000/config.yaml").read_text())
    assert (again["defense"], again["val_steps"]) == (
        next(t for t in report["trials"] if t["trial"] == "0000")["values"]["defense"], 1
    )  # fmt: skip


def check_tensorboard(run, trial):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    written = EventAccumulator(str(run / "tensorboard")).Reload()
    robust = written.Scalars("validation/robust_accuracy")
    rows = [json.loads(line) for line in (run / "history.jsonl").read_text().splitlines()]
    assert [(e.step, e.value) for e in robust] == [
        (row["epoch"], pytest.approx(row["val_robust_accuracy"])) for row in rows
    ]
    assert "train/robust_accuracy" in written.Tags()["scalars"]
    assert "_hparams_/session_start_info" in written.summary_metadata


@pytest.mark.slow
def test_three_failures_end_a_search_with_the_first_ones_cause(
    capfd, tmp_path, data, space, monkeypatch
):
    """And it goes on once that is mended."""
    from keras_emr.training import experiment

    def broken(*args, **options):
        raise ZeroDivisionError("the cause")

    arguments = ["tune", "--space", space, "--data", data, *SMALL, "--epochs", 1]
    with monkeypatch.context() as patch:
        patch.setattr(experiment, "train", broken)
        failed = call(capfd, *arguments, "--max-trials", 3, "--out", "s", "--quiet")
    assert_error(failed, 1, "3 trials in a row failed", "The first, 0000: ZeroDivisionError: the")
    assert_error(failed, 1, "s/errors/0000.txt", "keras-emr tune --out s --resume")
    assert "in broken" in (tmp_path / "s" / "errors" / "0000.txt").read_text()
    resumed = call(capfd, "tune", "--out", "s", "--resume", "--quiet", "--max-trials", 4)
    assert resumed.code == 0, resumed.err  # one trial more than was asked for at first
    trials = outcome(tmp_path / "s")["trials"]
    assert [trial["status"] for trial in trials] == ["completed"] * 4


@pytest.mark.slow
def test_hyperband_from_the_command_line(capfd, tmp_path, data):
    """Three epochs, factor 3: a bracket of 3 + 1 trials of 1 and 3 epochs, and one of 2."""
    (tmp_path / "space.yaml").write_text("learning_rate: [0.001, 0.002, 0.01, 0.03, 0.1]")
    arguments = ["--data", data, *SMALL, "--epochs", 3, "--search", "hyperband", "--finalists", 0]
    done = call(capfd, "tune", "--space", "space.yaml", *arguments, "--out", "s", "--json")
    assert done.code == 0, done.err
    trials = {trial["trial"]: trial for trial in json.loads(done.out)["trials"]}
    further = [trial for trial in trials.values() if trial["continues"]]
    assert further and all(trial["epochs"] == 3 for trial in further)
    for trial in further:
        before = tmp_path / "s/trials" / trial["continues"] / "history.jsonl"
        run = tmp_path / "s/trials" / trial["trial"] / "history.jsonl"
        assert run.read_text().startswith(before.read_text())
    assert sorted({trial["epochs"] for trial in trials.values()}) == [1, 3]
