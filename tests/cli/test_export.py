"""``keras-emr export``: what it publishes, what it refuses, and that it is all or nothing."""

import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest

from tests.cli.harness import (
    TINY,
    assert_error,
    call,
    clean_environment,
    command,
    python,
    shell,
    snapshot,
)

SIGNATURES = ["classify", "image_bytes", "regress", "robust", "serving_default"]


@pytest.fixture(scope="module")
def published(run, tmp_path_factory):
    """A run that was exported by a process, with ``--json``."""
    store = tmp_path_factory.mktemp("served") / "store"
    result = shell("export", run.path, "--to", store, "--json", "--keep", "0.9")
    assert result.code == 0, result.err
    return store, json.loads(result.out), result.err


def test_a_run_is_published(published, run):
    store, told, err = published
    assert told["path"] == str(store / "toy-run" / "1") and told["version"] == 1
    assert sorted(os.listdir(store / "toy-run")) == ["1"]
    assert [line.split(":")[0] for line in err.splitlines()] == ["reference", "gate"]
    folder = store / "toy-run" / "1"
    assert sorted(p.name for p in (folder / "assets.extra").iterdir()) == [
        *("keras_emr.json", "parity.json", "tf_serving_warmup_requests")
    ]
    card = json.loads((folder / "assets.extra" / "keras_emr.json").read_text())
    checked = json.loads((folder / "assets.extra" / "parity.json").read_text())
    assert (card, checked) == (told["card"], told["parity"])

    logits = checked["logits"]
    assert logits["images"] == 1024 and checked["adversarial_images"] == 512
    assert logits["relative_difference"] <= 1e-5 and logits["label_flips"] == 0
    assert checked["attack"] == {"name": "pgd", "epsilon": 8 / 255, "norm": "linf", "steps": 10}
    assert checked["source_backend"] == "tensorflow"

    assert card["labels"] == ["0", "1"] and card["image_shape"] == [8, 8, 1]
    assert card["signatures"] == SIGNATURES
    assert card["threat_model"] == {"norm": "linf", "epsilon": 8 / 255}
    assert card["metrics"]["epsilon_text"] == "8/255"
    environment = json.loads((run.path / "environment.json").read_text())
    assert card["data"]["sha256"] == environment["data_sha256"]
    report = json.loads((run.path / "report" / "training.json").read_text())
    (row,) = [
        r for r in report["results"] if r["checkpoint"] == "best" and r["model"] != "standard"
    ]
    assert card["metrics"]["run"]["robust_accuracy"] == row["robust_accuracy"]
    assert len(card["files"]) == 5  # graph, fingerprint, two of variables, warm-up
    for name, digest in card["files"].items():
        assert snapshot(folder)[name] == digest


def test_the_published_model_answers_as_its_source(published, run, data):
    import keras
    import tensorflow as tf

    from keras_emr import effective_margins

    store, told, _ = published
    model = keras.saving.load_model(run.path / "best.keras", compile=False)
    served = tf.saved_model.load(str(store / "toy-run" / "1")).signatures
    x = np.load(data)["x_test"]
    got = {k: v.numpy() for k, v in served["robust"](image=tf.constant(x)).items()}
    z = keras.ops.convert_to_numpy(model(x, training=False))
    np.testing.assert_allclose(got["logits"], z, atol=1e-5 * np.abs(z).max())
    margins = effective_margins(model, x, z.argmax(axis=1)).linf
    threshold = told["card"]["threshold"]["value"]
    np.testing.assert_array_equal(got["trusted"], margins > threshold)
    # Of the validation images, which the threshold was chosen on, --keep 0.9 are trusted.
    from keras_emr.data import load

    its = load(data, validation=0.1)
    predicted = model(its.x_val, training=False).numpy().argmax(axis=1)
    right = predicted == its.y_val
    kept = effective_margins(model, its.x_val, predicted).linf[right] > threshold
    assert right.any() and kept.mean() >= 0.9
    assert told["card"]["threshold"]["right"] == right.sum()


def test_a_version_that_exists(capfd, published, run):
    store, *_ = published
    before = snapshot(store)
    taken = call(capfd, "export", run.path, "--to", store, "--version", 1)
    assert_error(taken, 3, "--version", "it exists", "Received: 1", "another number, or auto")
    assert snapshot(store) == before


def bare(run, data, tmp_path):
    """A .keras file and its data, without the run around them."""
    shutil.copy(run.path / "best.keras", tmp_path / "plain.keras")
    return ("export", tmp_path / "plain.keras", "--data", data, "--to", tmp_path / "store")


def keras_file(path, *layers, shape=(8, 8, 1)):
    import keras

    keras.Sequential([keras.Input(shape), keras.layers.Flatten(), *layers]).save(path)
    return path


@pytest.mark.parametrize(
    ("change", "fragments"),
    [
        (["--name", "a/b"], ["--name", "'a/b'", "no '/'"]),
        (["--name", "7"], ["--name", "'7'", "not digits alone"]),
        (["--version", "0"], ["--version", "'0'", "from 1"]),
        (["--version", "latest"], ["--version", "'latest'", "auto"]),
        (["--to", "a-file"], ["--to", "not a folder", "a-file"]),
        (["--keep", "0"], ["--keep", "'0'"]),
        (["--epsilon", "0"], ["--epsilon", "'0'"]),
        (["--backend", "jaxx"], ["--backend", "'jaxx'", "did you mean 'jax'?"]),
        (["--data", "no.npz"], ["data file not found", "'no.npz'"]),
        (["--checkpoint", "last"], ["--checkpoint needs a run folder"]),
    ],
    ids=lambda value: " ".join(value),
)
def test_bad_settings(capfd, tmp_path, run, data, change, fragments):
    arguments = bare(run, data, tmp_path)
    (tmp_path / "a-file").write_text("x")
    before = snapshot(tmp_path)
    assert_error(call(capfd, *arguments, *change), 3, *fragments)
    assert snapshot(tmp_path) == before


def test_bad_targets(capfd, tmp_path, run, data):
    _, _, *rest = bare(run, data, tmp_path)
    (tmp_path / "folder").mkdir()
    before = snapshot(tmp_path)
    missing = call(capfd, "export", tmp_path / "no.keras", *rest)
    assert_error(missing, 3, "model not found", "no.keras")
    assert_error(call(capfd, "export", "folder", *rest), 3, "not a run folder", "'folder'")
    assert_error(call(capfd, "export", "plain.keras", "--to", "store"), 3, "--data", "Give --data")
    assert_error(call(capfd, "export", "plain.keras"), 2, "--to")
    assert snapshot(tmp_path) == before


def test_a_model_that_ends_in_softmax(capfd, tmp_path, data):
    """What else is no classifier: tests/serving/test_parity.py."""
    import keras

    stack = [keras.layers.Flatten(), keras.layers.Dense(2, activation="softmax")]
    keras.Sequential([keras.Input((8, 8, 1)), *stack]).save(tmp_path / "soft.keras")
    before = snapshot(tmp_path)
    refused = call(capfd, "export", "soft.keras", "--data", data, "--to", "store", "--quiet")
    assert_error(refused, 3, "must end in logits", "softmax", "Make the last layer linear")
    assert snapshot(tmp_path) == before


def test_data_that_the_run_was_not_trained_on(capfd, tmp_path, run, data):
    copy = shutil.copytree(run.path, tmp_path / "run")
    told = json.loads((copy / "environment.json").read_text())
    (copy / "environment.json").write_text(json.dumps({**told, "data_sha256": "0" * 64}))
    refused = call(capfd, "export", copy, "--to", "store")
    assert_error(refused, 3, "not what the run was trained on", "--data")
    assert not Path("store").exists()


def between(monkeypatch, act):
    """Call ``act(work)`` after the model is built and before it goes through the gate."""
    from keras_emr_serving.export import stages

    run_stage = stages.run

    def with_a_plant(tasks, work, *backend):
        if tasks == ["gate"]:
            act(work)
        return run_stage(tasks, work, *backend)

    monkeypatch.setattr(stages, "run", with_a_plant)


@pytest.mark.slow
def test_a_planted_difference_is_refused(capfd, monkeypatch, tmp_path, run, data):
    def plant(work):
        with np.load(work / "reference.npz") as kept:
            arrays = dict(kept)
        arrays["logits"][700, 0] += 1e-4 * np.abs(arrays["logits"]).max()
        np.savez(work / "reference.npz", **arrays)

    arguments = bare(run, data, tmp_path)
    before = snapshot(tmp_path)
    between(monkeypatch, plant)
    result = call(capfd, *arguments, "--quiet")
    assert_error(result, 4, "parity", "1.0e-04 of their scale", "on 1024 images", "1e-05")
    assert snapshot(tmp_path) == before


def test_a_stage_that_dies_is_one_line(capfd, monkeypatch, tmp_path, run, data):
    from keras_emr_serving.export import stages

    monkeypatch.setattr(stages.sys, "executable", "/bin/false")
    arguments = bare(run, data, tmp_path)
    before = snapshot(tmp_path)
    result = call(capfd, *arguments, "--quiet")
    assert_error(result, 1, "reference and build ended without a result (exit code 1)")
    assert snapshot(tmp_path) == before


def test_a_package_that_is_missing(capfd, monkeypatch, tmp_path, run, data):
    from keras_emr_cli import export

    find = export.importlib.util.find_spec
    for missing, fix in (
        ("jax", "'keras-emr[jax]'; or give --backend tensorflow"),
        ("tensorflow_serving", "'keras-emr[serving]'"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(
                export.importlib.util,
                "find_spec",
                lambda name, *rest, missing=missing: None if name == missing else find(name, *rest),
            )
            arguments = (*bare(run, data, tmp_path), "--backend", "jax")
            refused = call(capfd, *arguments)
        assert_error(refused, 3, f"{missing} is not installed", fix)


@pytest.mark.parametrize(
    "kilobytes",
    [
        1,  # not even the data for the stages
        pytest.param(190, marks=pytest.mark.slow),
        pytest.param(300, marks=[pytest.mark.slow, pytest.mark.long]),
    ],
)
def test_a_disk_that_takes_no_more(tmp_path, run, data, kilobytes):
    """By a limit on the size of files: 190 stops the adversarial images, 300 the weights."""
    arguments = bare(run, data, tmp_path)
    before = snapshot(tmp_path)
    limit = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({kilobytes << 10},) * 2);"
    code = f"{limit} import sys; from keras_emr_cli.main import main; main(sys.argv[1:])"
    result = python("-c", code, *arguments, "--quiet")
    assert_error(result, 3, "--to: cannot write there", "File too large", "Expected a folder")
    assert snapshot(tmp_path) == before


def processes_about(path):
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if str(path).encode() in (folder / "cmdline").read_bytes():
                found.append(folder.name)
        except OSError:
            continue
    return found


def stopped(arguments, models, number):
    """Start an export and send it ``number`` when its model is half-built: what it printed."""
    process = subprocess.Popen(
        command(*arguments, "--quiet"),
        env=clean_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        for _ in range(1200):
            if list(models.glob(".partial-*/model")) or process.poll() is not None:
                break
            time.sleep(0.05)
        assert list(models.glob(".partial-*/model"))
        process.send_signal(number)
        out, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    for _ in range(200):
        if not processes_about(models):
            break
        time.sleep(0.05)
    assert processes_about(models) == []
    return process.returncode, out


@pytest.mark.slow
def test_a_killed_export_publishes_nothing_and_leaves_no_process(tmp_path, run, data):
    arguments = bare(run, data, tmp_path)
    models = tmp_path / "store" / "plain"
    assert stopped(arguments, models, signal.SIGKILL) == (-signal.SIGKILL, "")
    (left,) = os.listdir(models)
    assert left.startswith(".partial-")
    # The next export takes it away.
    again = shell(*arguments, "--version", 41, "--with-attack")
    assert again.code == 0, again.err
    assert os.listdir(models) == ["41"]
    assert f"published: {models / '41'}" in again.out
    assert f"signatures: attack, {', '.join(SIGNATURES)}" in again.out
    assert "0 label flips" in again.out and "trusted: effective margin (linf) above" in again.out
    requests = models / "41" / "assets.extra" / "tf_serving_warmup_requests"
    assert b"attack" in requests.read_bytes()
    card = json.loads((models / "41" / "assets.extra" / "keras_emr.json").read_text())
    assert card["threat_model"]["epsilon"] == 8 / 255 and card["metrics"]["run"] is None


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_interrupted_export_cleans_up(tmp_path, run, data, number):
    arguments = bare(run, data, tmp_path)
    before = snapshot(tmp_path)
    code, out = stopped(arguments, tmp_path / "store" / "plain", number)
    assert (code, out.strip()) == (130, "Error: interrupted")
    assert snapshot(tmp_path) == before


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["jax", pytest.param("torch", marks=pytest.mark.long)])
def test_a_run_of_another_backend(tmp_path, data, backend, jax_cache):
    options = (*TINY, "--model", "small-cnn", "--data", data, "--epsilon", "0.1", "--out", "run")
    trained = shell("train", *options, "--backend", backend, cwd=tmp_path, **jax_cache)
    assert trained.code == 0, trained.err
    result = shell("export", "run", "--to", "store", "--json", cwd=tmp_path, **jax_cache)
    assert result.code == 0, result.err
    told = json.loads(result.out)
    assert told["parity"]["source_backend"] == backend == told["card"]["source"]["backend"]
    assert told["parity"]["logits"]["relative_difference"] <= 1e-5
    assert told["parity"]["logits"]["label_flips"] == 0
    assert (tmp_path / "store" / "run" / "1" / "saved_model.pb").exists()
    assert f"source model on {backend}" in result.err
