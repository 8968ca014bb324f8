"""A finished run: its files, its figures, and that they can be had again."""

import json
from pathlib import Path

import keras
import numpy as np
import pytest
import yaml

import keras_emr
from keras_emr.data import load
from keras_emr.data.registry import located
from tests.builders import assert_same_arrays, newest_checkpoint
from tests.cli.harness import (
    ONLY_PGD,
    TINY,
    assert_error,
    call,
    history,
    python,
    weights,
    write_data,
)

pytestmark = pytest.mark.usefixtures("warm_keras")

DRIVER = """
import contextlib, io, json, sys
from keras_emr_cli.main import main
ends = []
for arguments in json.loads(sys.argv[1]):
    caught = io.StringIO()
    with contextlib.redirect_stderr(caught), contextlib.redirect_stdout(io.StringIO()):
        try:
            main(arguments)
        except SystemExit as stop:
            ends.append([stop.code, caught.getvalue()])
print(json.dumps(ends))
"""

USE_WITHOUT_US = """
import json, sys
sys.modules["keras_emr"] = sys.modules["keras_emr_cli"] = None
import keras, numpy as np
x = np.load(sys.argv[1])["x_test"]
logits = [keras.saving.load_model(path)(x) for path in sys.argv[2:]]
print(json.dumps([keras.ops.convert_to_numpy(z).tolist() for z in logits]))
"""


def report(run):
    return json.loads((run.path / "report" / "training.json").read_text())


def environment(run):
    return json.loads((run.path / "environment.json").read_text())


def test_the_files_of_a_run(run):
    files = {str(path.relative_to(run.path)) for path in run.path.rglob("*") if path.is_file()}
    own = ["history.jsonl", "best.keras", "last.keras"]
    for place in ("00002", "00003"):  # the two newest: at the begin of an epoch
        checkpoint = f"checkpoints/epoch-{place}-step-0000000"
        own += [f"{checkpoint}/{name}" for name in ("arrays.npz", "state.json", "manifest.json")]
    whole = ["config.yaml", "environment.json", "report/training.json"]
    assert files == {*own, *whole, *(f"baseline/{name}" for name in own)}


def test_json_is_all_there_is_on_stdout(run):
    assert json.loads(run.result.out) == report(run)
    lines = run.result.err.splitlines()
    assert len(lines) == 4
    for line, start in zip(
        lines,
        [f"{title}  epoch {i}/2  " for title in ("trades + EMR", "standard") for i in (1, 2)],
        strict=True,
    ):
        assert line.startswith(start)
    assert "val_robust_accuracy" in lines[0]


def test_history(run):
    rows = [json.loads(line) for line in (run.path / "history.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in rows] == [1, 2]
    metrics = ("loss", "accuracy", "robust_accuracy", "emr")
    margins = ("effective_margin_l2", "effective_margin_linf", "share_above_epsilon")
    expected = {"epoch", "seconds", *metrics, *(f"val_{name}" for name in metrics + margins)}
    for row in rows:
        assert set(row) == {*expected, "val_effective_weight_norm"}
        assert all(np.isfinite(value) for value in row.values())
        assert row["emr"] > 0 and row["val_emr"] > 0 and row["seconds"] > 0
        for share in ("accuracy", "robust_accuracy", "val_accuracy", "val_robust_accuracy"):
            assert 0 <= row[share] <= 1
        assert row["val_robust_accuracy"] <= row["val_accuracy"]


def test_environment(run, data):
    found = environment(run)
    assert found["versions"]["keras_emr"] == keras_emr.__version__
    assert found["versions"]["keras"] == keras.__version__
    assert {"python", "numpy", "tensorflow"} <= set(found["versions"])
    assert found["hardware"]["devices"] and found["hardware"]["cpu_cores"] >= 1
    assert (found["backend"], found["seed"], found["split_seed"]) == ("tensorflow", 7, 0)
    assert (found["data"], found["data_sha256"]) == ("toy", load(data).fingerprint)


def test_config_repeats_the_run(capfd, run):
    """``--config RUN/config.yaml`` gives the settings that the run's own flags gave."""
    flags = [str(a) for a in run.arguments[1:] if a != "--json"]
    settings, of_the_process = [], ("out", "coordinator", "processes", "process", "join_timeout")
    for arguments in (flags, ["--config", run.path / "config.yaml"]):
        result = call(capfd, "config", "show", "--json", *arguments)
        assert (result.code, result.err) == (0, "")
        shown = json.loads(result.out)
        kept = {name: row["value"] for name, row in shown.items() if name not in of_the_process}
        settings.append(kept)
    assert settings[0] == settings[1] == report(run)["settings"]


def test_epsilon_is_written_as_it_was_given(capfd, run):
    assert "epsilon: 8/255\n" in (run.path / "config.yaml").read_text()
    assert report(run)["settings"]["epsilon"] == "8/255"
    assert report(run)["results"][0]["attack"]["epsilon"] == 8 / 255
    result = call(capfd, "evaluate", run.path, *ONLY_PGD, "--out", "r")
    assert "20 test images" in result.out and "linf, epsilon 8/255; seed 0" in result.out
    result = call(capfd, "train", "--resume", "--out", run.path)
    assert "20 test images; linf, epsilon 8/255; seed 7; tensorflow" in result.out
    assert "PGD-2x1" in result.out and f"run: {run.path}" in result.out.replace("\n", "")


def stored(run):
    return yaml.safe_load((Path(run) / "config.yaml").read_text())


@pytest.mark.slow
def test_a_run_finds_its_data_from_another_folder(capfd, tmp_path, monkeypatch):
    """Given as a relative path; the run's folder is still named after the file as given."""
    write_data(tmp_path / "my toy.npz")
    assert call(capfd, "train", *TINY, "--data", "my toy.npz").code == 0
    run = tmp_path / "runs" / "my toy-mlp-trades-emr"
    assert stored(run)["data"] == str(tmp_path / "my toy.npz")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert call(capfd, "evaluate", run, *ONLY_PGD, "--out", "r").code == 0
    repeat = ("train", "--config", run / "config.yaml", "--out", "again")
    assert call(capfd, *repeat).code == 0
    assert history("again") == history(run)
    # Repeating the flag is no change, however the path is written.
    for written in ("../my toy.npz", f"{tmp_path}/elsewhere/../my toy.npz"):
        resumed = call(capfd, "train", "--out", run, "--resume", "--data", written)
        assert resumed.code == 0, resumed.err
        assert stored(run)["data"] == str(tmp_path / "my toy.npz")
    write_data(tmp_path / "elsewhere" / "my toy.npz")
    other = call(capfd, "train", "--out", run, "--resume", "--data", "my toy.npz")
    assert_error(other, 3, "data:", str(tmp_path / "my toy.npz"))


def test_named_data_stays_a_name():
    assert located("digits") == "digits"
    assert located("./digits") == str(Path.cwd() / "digits")
    assert located("~/x.npz") == str(Path.home() / "x.npz")
    assert located("") == ""


def test_a_run_is_evaluated_with_its_own_validation_share(capfd, tmp_path, data):
    """Four images: a tenth of them is none, and none cannot be held out."""
    write_data(tmp_path / "four.npz", n=4)
    arguments = ("--validation", "0.5", "--batch-size", 2, "--out", "run")
    result = call(capfd, "train", *TINY, "--data", "four.npz", *arguments)
    assert result.code == 0, result.err
    result = call(capfd, "evaluate", "run", *ONLY_PGD, "--json")
    assert result.code == 0, result.err
    assert json.loads(result.out)["accuracy"]["n"] == 20
    # Other data are split as usual.
    again = call(capfd, "evaluate", "run", "--data", "four.npz", *ONLY_PGD)
    assert_error(again, 3, "x_train", "4 images", "validation=0.1")


@pytest.mark.slow
def test_a_preset_repeats_from_its_config(capfd, data):
    arguments = (*TINY, "--data", data, "--emr-preset", "trades-emr-released")
    assert call(capfd, "train", *arguments, "--out", "run").code == 0
    assert call(capfd, "train", "--config", "run/config.yaml", "--out", "again").code == 0
    assert history("again") == history("run")
    assert call(capfd, "train", "--out", "run", "--resume").code == 0


@pytest.mark.slow
@pytest.mark.long
def test_mail_burns_in_as_long_when_a_run_gets_more_epochs(capfd, data):
    arguments = ("train", *TINY, "--data", data, "--defense", "mail-at", "--epochs", 3)
    assert call(capfd, *arguments, "--out", "run").code == 0
    assert stored("run")["mail_burn_in"] == 2  # 76/120 of 3
    resume = ("train", "--out", "run", "--resume", "--epochs", 5)
    assert call(capfd, *resume, "--steps", 2).code == 0
    assert stored("run")["mail_burn_in"] == 2 and stored("run")["epochs"] == 5
    # The config repeats the run; `auto` on resuming means the run's own; another number is refused.
    repeat = ("train", "--config", "run/config.yaml", "--out", "again")
    assert call(capfd, *repeat).code == 0
    assert history("again") == history("run")
    auto = call(capfd, *resume, "--mail-burn-in", "auto", "--epochs", 6)
    assert auto.code == 0, auto.err
    assert stored("run")["mail_burn_in"] == 2
    assert_error(call(capfd, *resume, "--mail-burn-in", 3), 3, "mail_burn_in", "3", "2")
    # Nothing to resolve where there is no MAIL.
    assert call(capfd, "train", *TINY, "--data", data, "--out", "trades").code == 0
    assert stored("trades")["mail_burn_in"] == "auto"


def test_report(run):
    results = report(run)["results"]
    assert [(r["model"], r["checkpoint"]) for r in results[:2]] == [
        ("standard", "best"),
        ("trades + EMR", "best"),
    ]
    rows = history(run.path)
    best = max(rows, key=lambda row: row["val_robust_accuracy"])
    assert results[1]["epoch"] == best["epoch"]
    assert results[1]["chosen_by"] == "val_robust_accuracy"
    # The baseline is judged by the same attack, but neither chosen nor validated by one.
    assert results[0]["chosen_by"] == "val_accuracy"
    for row in history(run.path / "baseline"):
        assert "val_accuracy" in row and "val_robust_accuracy" not in row
    for result in results:
        attack = result["attack"]
        assert (attack["name"], attack["norm"], attack["steps"]) == ("pgd", "linf", 2)
        assert (attack["restarts"], attack["start"]) == (1, "uniform")
        assert (result["n"], result["seed"], result["bn_mode"]) == (20, 7, "inference")
        assert 0 <= result["robust_accuracy"] <= result["accuracy"] <= 1
        assert result["max_perturbation"] <= 8 / 255 + 1e-6


def test_evaluate_finds_what_the_report_says(capfd, run):
    attack = (*ONLY_PGD, "--steps", 2, "--seed", 7, "--json", "--quiet", "--out", "r")
    rows = [r for r in report(run)["results"] if r["model"] == "trades + EMR"]
    for row in rows:
        result = call(capfd, "evaluate", run.path, *attack, "--checkpoint", row["checkpoint"])
        assert (result.code, result.err) == (0, "")
        told = json.loads(result.out)
        assert told["accuracy"]["clean"] == row["accuracy"]
        assert told["accuracy"]["robust"] == row["robust_accuracy"]
        assert told["accuracy"]["n"] == row["n"]
        (entry,) = told["attacks"]
        shared = ("epsilon", "norm", "steps", "step_size", "start", "restarts", "objective")
        for key in shared:
            assert entry["options"][key] == row["attack"][key]
        margins = told["margins"]["clean"]
        for key in ("effective_margin_l2", "effective_margin_linf", "share_above_epsilon"):
            assert margins[key] == pytest.approx(row["margins"][key], rel=1e-6)


def test_evaluate_several_attacks_on_the_first_images(capfd, run, data):
    path = run.path / "last.keras"
    arguments = ["--data", data, "--epsilon", "8/255", "--attacks", "pgd, fgsm,cw"]
    arguments += ["--n-examples", 5, "--extra-examples", 0, "--json", "--quiet", "--out", "r"]
    result = call(capfd, "evaluate", path, *arguments)
    assert (result.code, result.err) == (0, "")
    told = json.loads(result.out)
    assert [e["name"] for e in told["attacks"]] == ["pgd-50x5", "fgsm", "cw-50x5"]
    assert [e["mode"] for e in told["attacks"]] == ["individual"] * 3
    assert told["attacks"][2]["options"]["objective"] == "margin"
    assert told["accuracy"]["n"] == 5 and told["robustbench"]["autoattack_acc"] is None


def test_evaluate_a_network_for_images_of_any_size(capfd, tmp_path, data):
    layers = keras.layers
    stack = [keras.Input((None, None, 1)), layers.Conv2D(4, 3), layers.GlobalAveragePooling2D()]
    keras.Sequential([*stack, layers.Dense(2)]).save("any.keras")
    arguments = ["--data", data, "--epsilon", "0.1", *ONLY_PGD, "--json"]
    result = call(capfd, "evaluate", "any.keras", *arguments)
    assert result.code == 0, result.err
    assert json.loads(result.out)["accuracy"]["n"] == 20
    assert (tmp_path / "any-report" / "report.html").exists()


def test_a_finished_run_can_be_asked_again(capfd, run):
    """Nothing is left to train; the files stay, the report is the same but for the times."""
    weights_before = (run.path / "best.keras").read_bytes()
    result = call(capfd, "train", "--resume", "--out", run.path, "--json")
    assert result.code == 0, result.err
    again, first = json.loads(result.out), json.loads(run.result.out)
    for results in (again["results"], first["results"]):
        for row in results:
            row.pop("seconds")
    assert again["results"] == first["results"]
    assert (run.path / "best.keras").read_bytes() == weights_before
    assert len(history(run.path)) == 2


@pytest.mark.slow
def test_models_work_without_keras_emr(run, data, tmp_path):
    """In a process that cannot import it, and on another backend than they were trained with."""
    cnn = keras_emr.small_cnn((8, 8, 1), 2)
    for variable in cnn.trainable_variables:
        variable.assign(np.random.default_rng(1).normal(0, 0.1, variable.shape))
    cnn.save("cnn.keras")
    paths = [run.path / "best.keras", run.path / "last.keras", tmp_path / "cnn.keras"]
    result = python("-c", USE_WITHOUT_US, data, *paths, KERAS_BACKEND="torch")
    assert result.code == 0, result.err
    x = np.load(data)["x_test"]
    for path, found in zip(paths, json.loads(result.out), strict=True):
        expected = keras.saving.load_model(path)(x)
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
        assert not np.allclose(np.sum(found, axis=-1), 1)


# --- the same command again, and in two parts


@pytest.fixture(
    scope="module",
    params=[
        "tensorflow",
        pytest.param("jax", marks=pytest.mark.slow),
        pytest.param("torch", marks=[pytest.mark.slow, pytest.mark.long]),
    ],
)
def twins(request, tmp_path_factory, jax_cache):
    """Two processes train the same models: the folder with their runs, and how each call ended.

    In the first: ``mlp-1``, ``cnn-whole`` (3 epochs), ``cnn-parts`` (1 epoch). In the second:
    ``mlp-2`` from the stored settings of ``mlp-1``, ``cnn-parts`` resumed to 3 epochs, ``nan``.
    """
    folder = tmp_path_factory.mktemp(request.param)
    data = write_data(folder / "three.npz", classes=3)
    common = [*TINY, "--data", data.name, "--backend", request.param, "--seed", "3"]
    common += ["--steps", "1", "--val-steps", "1", "--eval-steps", "1"]  # compiles quicker
    # Dropout, the attack's start and the regularizer's signs: every kind of noise there is.
    cnn = ["--model", "small-cnn", "--emr-weighting", "rademacher", "--emr-decay-epochs", "2"]
    diverging = ["--optimizer", "sgd", "--learning-rate", "1e30"]
    processes = {
        "first": [
            ["train", *common, "--epochs", "2", "--out", "mlp-1"],
            ["train", *common, *cnn, "--epochs", "3", "--out", "cnn-whole"],
            ["train", *common, *cnn, "--epochs", "1", "--out", "cnn-parts"],
        ],
        "second": [
            ["train", "--config", "mlp-1/config.yaml", "--out", "mlp-2"],
            ["train", "--out", "cnn-parts", "--resume", "--epochs", "3"],
            ["train", *common, *diverging, "--out", "nan", "--quiet"],
        ],
    }
    ends = {}
    for which, arguments in processes.items():
        result = python("-c", DRIVER, json.dumps(arguments), cwd=folder, **jax_cache)
        assert result.code == 0, result.err
        ends[which] = (json.loads(result.out), result.err)
    return folder, ends


def test_stderr_holds_nothing_but_our_lines(twins):
    """The driver takes what Python writes there; libraries write to the file descriptor."""
    _, ends = twins
    for _, native in ends.values():
        assert native == ""
    for calls, _ in ends.values():
        for _, err in calls:
            for line in err.splitlines():
                assert line.startswith(("trades + EMR  epoch ", "Error: ", "Warning: ")), err


def test_the_same_command_gives_the_same_history(twins):
    folder, _ = twins
    assert history(folder / "mlp-1") == history(folder / "mlp-2")
    assert len(history(folder / "mlp-1")) == 2
    for a, b in zip(
        weights(folder / "mlp-1/last.keras"), weights(folder / "mlp-2/last.keras"), strict=True
    ):
        np.testing.assert_array_equal(a, b)


def test_a_resumed_run_equals_an_uninterrupted_one(twins):
    folder, ends = twins
    ends = ends["first"][0] + ends["second"][0]
    assert [code for code, _ in ends] == [0, 0, 0, 0, 0, 1], ends
    whole, parts = history(folder / "cnn-whole"), history(folder / "cnn-parts")
    assert [row["epoch"] for row in parts] == [1, 2, 3]
    assert parts == whole
    for name in ("last.keras", "best.keras"):
        pairs = zip(
            weights(folder / "cnn-whole" / name), weights(folder / "cnn-parts" / name), strict=True
        )
        for a, b in pairs:
            np.testing.assert_array_equal(a, b)
    (_, one), (_, other) = (
        newest_checkpoint(folder / f"cnn-{part}") for part in ("whole", "parts")
    )
    assert_same_arrays(one, other)
    epochs_shown = [line.split("epoch ")[1][:3] for line in ends[4][1].splitlines()]
    assert epochs_shown == ["2/3", "3/3"]


def test_the_noise_differs_from_epoch_to_epoch(twins):
    folder, _ = twins
    rows = history(folder / "cnn-whole")
    assert len({row["emr"] for row in rows}) == 3


def test_divergence_is_one_line_that_names_step_and_epoch(twins):
    folder, ends = twins
    code, err = ends["second"][0][2]
    assert code == 1
    assert err.count("\n") == 1 and err.startswith("Error: loss became ")
    assert " at step " in err and " of epoch 1." in err and "learning rate" in err
    assert not (folder / "nan" / "last.keras").exists()
