"""``keras-emr evaluate``: the report, AutoAttack, and evaluations that are cut short."""

import json
import os
import signal
import subprocess
import time

import numpy as np
import pytest

from keras_emr.reports.files import read_report
from tests.cli.harness import (
    ONLY_PGD,
    assert_error,
    call,
    clean_environment,
    command,
    shell,
    snapshot,
)

AUTO = ("--attacks", "autoattack", "--n-examples", 12)


@pytest.fixture(scope="module")
def weak(tmp_path_factory):
    """A data file and a linear model that AutoAttack breaks only now and then."""
    import keras

    folder = tmp_path_factory.mktemp("weak")
    rng = np.random.default_rng(0)
    y = np.arange(64) % 4
    x = rng.uniform(0.3, 0.5, (64, 6, 6, 1)).astype("float32")
    x[np.arange(64), y] += np.linspace(0.02, 0.5, 64)[:, None, None].astype("float32")
    parts = {"x_train": x, "y_train": y, "x_test": x[::3], "y_test": y[::3]}
    np.savez(folder / "rows.npz", **parts)
    model = keras.Sequential(
        [keras.Input((6, 6, 1)), keras.layers.Flatten(), keras.layers.Dense(4)]
    )
    kernel = np.zeros((6, 6, 4), "float32")
    for k in range(4):
        kernel[k, :, k] = 1.0
    model.layers[-1].set_weights([kernel.reshape(36, 4), np.zeros(4, "float32")])
    model.save(folder / "rows.keras")
    return folder


def given(weak, *more):
    return (weak / "rows.keras", "--data", weak / "rows.npz", "--epsilon", "0.1", *more)


@pytest.fixture(scope="module")
def whole(weak):
    """What AutoAttack tells of it in a process that nobody stops."""
    arguments = given(weak, *AUTO, "--extra-examples", 0, "--out", weak / "whole", "--json")
    result = shell("evaluate", *arguments)
    assert result.code == 0, result.err
    return outcome(json.loads(result.out))


def test_the_report_of_autoattack(capfd, tmp_path, weak):
    arguments = given(weak, *AUTO, "--extra-examples", 6, "--out", "r", "--batch-size", 8)
    result = call(capfd, "evaluate", *arguments, "--json")
    assert result.code == 0, result.err
    report = json.loads(result.out)
    assert report == read_report(tmp_path / "r")  # validated on the way
    names = ["apgd-ce", "apgd-t", "fab-t", "square"]
    assert [entry["name"] for entry in report["attacks"]] == names
    assert [entry["mode"] for entry in report["attacks"]] == ["survivors"] * 4

    # The exact answer: a linear model survives where margin > epsilon * ||w_y - w_j||_1.
    rows = np.load(weak / "rows.npz")
    x, y = rows["x_test"][:12].astype("float64"), rows["y_test"][:12]
    logits = x[:, :4].sum(axis=(2, 3))
    gaps = logits[np.arange(12), y][:, None] - logits
    gaps[np.arange(12), y] = np.inf
    survives = gaps.min(axis=1) > 0.1 * 12  # away from the walls of the box
    assert 0 < survives.sum() < 12
    assert report["accuracy"]["survived"] == survives.sum()
    assert report["robustbench"]["autoattack_acc"] == pytest.approx(100 * survives.mean(), abs=1e-3)
    clean = 100 * (gaps.min(axis=1) > 0).mean()
    assert report["robustbench"]["clean_acc"] == pytest.approx(clean, abs=1e-3)

    assert [check["id"] for check in report["checks"]][:20] == [f"M{i}" for i in range(1, 21)]
    verdicts = {check["id"]: check["verdict"] for check in report["checks"]}
    assert "fail" not in verdicts.values()
    # What the attacks found has reached the checks.
    made = ("M1", "M2", "M8", "M12", "M14", "M18", "A-square")
    assert [verdicts[id] for id in made] == ["pass"] * 7, report["checks"]
    assert report["threat_model"]["knowledge"].startswith("white box")
    assert report["curves"]["epsilon"]["n"] == 6
    assert sorted(path.name for path in (tmp_path / "r").iterdir()) == [
        "gallery.npz",
        "report.html",
        "report.json",
    ]
    assert "<html" in (tmp_path / "r" / "report.html").read_text()


def test_what_is_printed(capfd, weak):
    result = call(capfd, "evaluate", *given(weak, *ONLY_PGD, "--out", "r", "--attacks", "pgd,fgsm"))
    assert_error(result, 3, "--steps", "fgsm has none")
    arguments = given(weak, "--attacks", "fgsm,square", "--n-examples", 16, "--out", "r")
    result = call(capfd, "evaluate", *arguments, "--extra-examples", 0)
    assert result.code == 0, result.err
    for text in (
        "fgsm",
        "square",
        "all right ones",
        "robust accuracy",
        "of 16 survive every attack",
    ):
        assert text in result.out
    assert "r/report.html" in result.out
    # Where there is no terminal: a line per attack.
    assert [line.split("  ")[0] for line in result.err.splitlines()][:2] == ["fgsm", "square"]
    assert all("  done in " in line for line in result.err.splitlines()), result.err
    few = call(capfd, "evaluate", *given(weak, *ONLY_PGD, "--n-examples", 2, "--out", "few"))
    assert "note: 2 of 4 classes are not among these 2 images" in few.out


def stop_when_the_state_is_there(arguments, cwd, number):
    """Start an evaluation and send it ``number`` as soon as it has written its state."""
    process = subprocess.Popen(
        command("evaluate", *arguments, "--quiet"),
        cwd=cwd,
        env=clean_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        state = cwd / "r" / "state" / "00-autoattack.npz"
        for _ in range(1200):
            if state.exists() or process.poll() is not None:
                break
            time.sleep(0.05)
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert state.exists(), err
    return process.returncode, out, err


def outcome(report):
    kept = ("name", "attacked", "broken", "robust_accuracy", "queries")
    return [[entry[key] for key in kept] for entry in report["attacks"]], report["accuracy"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "code"),
    [
        (signal.SIGKILL, -9),
        (signal.SIGTERM, 75),
        pytest.param(signal.SIGINT, 130, marks=pytest.mark.long),
    ],
    ids=str,
)
def test_a_killed_evaluation_goes_on(capfd, tmp_path, weak, whole, number, code):
    arguments = given(weak, *AUTO, "--extra-examples", 0, "--out", "r")
    ended, out, err = stop_when_the_state_is_there(arguments, tmp_path, number)
    assert (ended, out) == (code, ""), err
    assert "Traceback" not in err and (code < 0 or "call it again to go on" in err)
    assert not (tmp_path / "r" / "report.json").exists()

    # With another setting it is not taken for the same evaluation, and stays.
    before = snapshot(tmp_path)
    other = [*arguments[:4], "0.12", *arguments[5:]]
    refused = call(capfd, "evaluate", *other, "--quiet")
    assert_error(refused, 3, "another evaluation, epsilon differs", "0.1", "0.12", "--fresh")
    assert snapshot(tmp_path) == before

    again = call(capfd, "evaluate", *arguments, "--json")
    assert again.code == 0, again.err
    assert outcome(json.loads(again.out)) == whole
    assert not (tmp_path / "r" / "state").exists()


@pytest.mark.slow
def test_a_time_budget(capfd, tmp_path, weak):
    arguments = given(weak, *AUTO, "--extra-examples", 4, "--out", "r")
    cut = call(capfd, "evaluate", *arguments, "--time-budget", 0, "--json")
    assert cut.code == 75 and "call it again" in cut.err
    (tmp_path / "r" / "state" / "mine.txt").write_text("not to be deleted")
    report = json.loads(cut.out)
    assert not report["complete"] and report["robustbench"]["autoattack_acc"] is None
    assert report["checks"] == [] and report["curves"]["steps"] is None
    assert (tmp_path / "r" / "state").is_dir()
    fresh = call(capfd, "evaluate", *arguments, "--fresh", "--epsilon", "0.05", "--json")
    assert fresh.code == 0, fresh.err
    assert json.loads(fresh.out)["complete"]
    assert [path.name for path in (tmp_path / "r" / "state").iterdir()] == ["mine.txt"]


def test_a_budget_that_ends_after_autoattack(capfd, tmp_path, weak, monkeypatch):
    """The suite ran to its end, the evaluation did not: no number that looks final."""
    from keras_emr.evaluation.autoattack import AutoAttack, OutOfTime

    run_on = AutoAttack.run_on

    def second_is_out_of_time(self, *arguments, **options):
        if self.version == "custom":
            options["time_budget"] = 0.0
        return run_on(self, *arguments, **options)

    monkeypatch.setattr(AutoAttack, "run_on", second_is_out_of_time)
    arguments = given(weak, "--attacks", "autoattack,pgd", "--n-examples", 12, "--out", "r")
    result = call(capfd, "evaluate", *arguments, "--time-budget", 1000, "--json")
    assert result.code == 75, result.err
    report = json.loads(result.out)
    assert not report["complete"] and report["robustbench"]["autoattack_acc"] is None
    assert OutOfTime.__name__ not in result.err


def test_attacks_on_survivors(capfd, weak):
    arguments = given(weak, "--attacks", "apgd-ce,apgd-dlr,square", "--steps", 20, "--survivors")
    result = call(capfd, "evaluate", *arguments, "--extra-examples", 0, "--out", "r", "--json")
    assert result.code == 0, result.err
    first, second, third = json.loads(result.out)["attacks"]
    assert (first["options"]["objective"], second["options"]["objective"]) == (
        "cross_entropy",
        "dlr",
    )
    assert second["attacked"] == first["attacked"] - first["broken"]
    assert third["attacked"] == second["attacked"] - second["broken"]
    refused = call(capfd, "evaluate", *given(weak, *AUTO, "--survivors"))
    assert_error(refused, 3, "--survivors", "Received: autoattack")


def test_a_run_is_evaluated_from_within(capfd, run, monkeypatch, tmp_path):
    monkeypatch.chdir(run.path)
    result = call(capfd, "evaluate", ".", *ONLY_PGD, "--out", tmp_path / "r", "--json")
    assert result.code == 0, result.err
    assert json.loads(result.out)["model"]["name"] == "toy-run"
    other_norm = call(capfd, "evaluate", ".", *ONLY_PGD, "--norm", "l2")
    assert_error(other_norm, 3, "--epsilon", "another norm", "linf")


@pytest.mark.slow
def test_a_random_model_is_counted_once(capfd, tmp_path, weak):
    """Its answers differ from call to call; every attack must start from the same ones."""
    import keras

    class Noise(keras.layers.Layer):
        def __init__(self, **options):
            super().__init__(**options)
            self.generator = keras.random.SeedGenerator(0)

        def call(self, x):
            return x + 0.1 * keras.random.normal(keras.ops.shape(x), seed=self.generator)

    keras.saving.register_keras_serializable("tests")(Noise)
    plain = keras.saving.load_model(weak / "rows.keras")
    noisy = keras.Sequential([keras.Input((6, 6, 1)), Noise(), *plain.layers])
    noisy.save(tmp_path / "noisy.keras")
    arguments = ["noisy.keras", *given(weak)[1:], "--attacks", "fgsm,mi-fgsm,square", "--out", "r"]
    result = call(capfd, "evaluate", *arguments, "--extra-examples", 16, "--json")
    assert result.code == 0, result.err
    report = json.loads(result.out)
    assert {entry["attacked"] for entry in report["attacks"]} == {report["accuracy"]["correct"]}
    (check,) = [check for check in report["checks"] if check["id"] == "M10"]
    assert check["verdict"] == "fail" and "random" in check["text"]
    averaged = call(capfd, "evaluate", *arguments[:-3], "autoattack-rand", "--out", "r2",
                    "--extra-examples", 8, "--n-examples", 8, "--json")  # fmt: skip
    (check,) = [c for c in json.loads(averaged.out)["checks"] if c["id"] == "M10"]
    assert check["verdict"] == "warn"


def test_several_attacks_count_together(capfd, weak):
    """Robust accuracy is the worst case by example, not the lowest of the accuracies."""
    arguments = given(
        weak, "--attacks", "fgsm,mi-fgsm,deepfool", "--extra-examples", 0, "--out", "r"
    )
    report = json.loads(call(capfd, "evaluate", *arguments, "--json").out)
    worst = min(entry["robust_accuracy"] for entry in report["attacks"])
    assert report["accuracy"]["robust"] <= worst
    assert all(entry["attacked"] == report["accuracy"]["correct"] for entry in report["attacks"])


def test_transfer(capfd, weak, tmp_path):
    arguments = given(weak, "--attacks", "transfer", "--extra-examples", 0, "--out", "r")
    result = call(capfd, "evaluate", *arguments, "--surrogates", weak / "rows.keras", "--json")
    assert result.code == 0, result.err
    (entry,) = json.loads(result.out)["attacks"]
    assert entry["queries"] == entry["attacked"] > entry["broken"] > 0
    missing = call(capfd, "evaluate", *arguments, "--overwrite", "--surrogates", "nowhere")
    assert_error(missing, 3, "model not found", "'nowhere'")


def test_a_transfer_that_was_cut_short_wants_the_same_surrogates(capfd, tmp_path, weak):
    import keras

    other = keras.saving.load_model(weak / "rows.keras")
    other.layers[-1].bias.assign([0.1, 0, 0, 0])
    other.save("other.keras")
    arguments = given(weak, "--attacks", "transfer", "--extra-examples", 0, "--out", "r", "--quiet")
    first, second = weak / "rows.keras", tmp_path / "other.keras"
    cut = call(capfd, "evaluate", *arguments, "--time-budget", 0, "--surrogates", first)
    assert cut.code == 75
    refused = call(capfd, "evaluate", *arguments, "--surrogates", second)
    assert_error(refused, 3, "another evaluation", "--fresh")
    again = call(capfd, "evaluate", *arguments, "--surrogates", first)
    assert again.code == 0, again.err


def test_a_disk_that_is_full_at_the_end_costs_no_attack(capfd, tmp_path, weak, monkeypatch):
    from keras_emr.reports import files

    def full(*_):
        raise OSError(28, "No space left on device")

    arguments = given(weak, *ONLY_PGD, "--out", "r", "--quiet")
    with monkeypatch.context() as patch:
        patch.setattr(files, "_write", full)
        assert_error(call(capfd, "evaluate", *arguments), 3, "No space left", "r")
    left = snapshot(tmp_path / "r")
    assert sorted(left) == ["state", "state/00-pgd-1x1.npz"]
    # Nothing is attacked again.
    monkeypatch.setattr("keras_emr.evaluation.session.GradientSession.find", full)
    again = call(capfd, "evaluate", *arguments, "--json")
    assert again.code == 0 and json.loads(again.out)["complete"], again.err


def test_an_earlier_report_survives_what_goes_wrong(capfd, tmp_path, weak, monkeypatch):
    arguments = given(weak, *ONLY_PGD, "--out", "r")
    assert call(capfd, "evaluate", *arguments).code == 0
    before = snapshot(tmp_path / "r")

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        result = call(capfd, "evaluate", *arguments, "--seed", 1, "--quiet")
    assert_error(result, 3, "No space left")
    left = snapshot(tmp_path / "r")
    assert {name: left[name] for name in before} == before and set(left) - set(before) <= {"state"}
    (tmp_path / "file").write_text("x")
    assert_error(call(capfd, "evaluate", *arguments[:-1], "file"), 3, "out", "not a folder")
    careful = [a for a in arguments if a != "--overwrite"]
    assert_error(call(capfd, "evaluate", *careful), 3, "finished report", "--overwrite")
    cut = call(capfd, "evaluate", *arguments, "--attacks", "autoattack", "--steps", "auto",
               "--restarts", "auto", "--time-budget", 0)  # fmt: skip
    assert cut.code == 75
    left = snapshot(tmp_path / "r")
    assert {name: left[name] for name in before} == before
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "report.html").write_text("my thesis")
    theirs = call(capfd, "evaluate", *arguments[:-1], "theirs")
    assert_error(theirs, 3, "not an evaluation of keras_emr")
