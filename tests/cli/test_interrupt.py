"""Ctrl-C, SIGTERM and divergence: the last good state is kept, and training can go on."""

import shutil
import signal
import subprocess
import time

import numpy as np
import pytest

from tests.cli.harness import (
    TINY,
    call,
    clean_environment,
    command,
    history,
    shell,
    snapshot,
    weights,
)


def stop_after_first_epoch(arguments, number, cwd):
    """Signal the process ``number`` once its first epoch is reported: (code, stderr, seconds)."""
    process = subprocess.Popen(
        command(*arguments),
        cwd=cwd,
        env=clean_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        seen = process.stderr.readline()
        assert "epoch 1/" in seen, seen + process.stderr.read()
        process.send_signal(number)
        sent = time.perf_counter()
        out, err = process.communicate(timeout=60)
        return process.returncode, seen + err, out, time.perf_counter() - sent
    finally:
        process.kill()


@pytest.mark.parametrize(
    ("number", "code", "backend"),
    [
        (signal.SIGINT, 130, "jax"),
        (signal.SIGINT, 130, "tensorflow"),
        (signal.SIGTERM, 75, "torch"),
    ],
    ids=["SIGINT-jax", "SIGINT-tensorflow", "SIGTERM-torch"],
)
def test_a_signal_stops_a_run_that_can_go_on(tmp_path, data, number, code, backend):
    arguments = [*TINY, "--data", data, "--backend", backend, "--out", "run", "--batch-size", 2]
    ended, err, out, seconds = stop_after_first_epoch(
        ["train", *arguments, "--epochs", 10_000], number, tmp_path
    )
    assert (ended, out) == (code, "")
    assert seconds < 20
    assert "Traceback" not in err
    (line,) = [line for line in err.splitlines() if line.startswith("Error: ")]
    assert err.splitlines()[-1] == line
    for fragment in (number.name, "last.keras", "keras-emr train --out run --resume"):
        assert fragment in line

    # `last.keras` holds the weights of that moment: beyond the last finished epoch.
    run = tmp_path / "run"
    done = len(history(run))
    assert done >= 1
    last, epoch_end = weights(run / "last.keras"), weights(run / "checkpoints" / "state.keras")
    assert all(np.isfinite(value).all() for value in last)
    assert any((a != b).any() for a, b in zip(last, epoch_end, strict=True))
    assert not (run / "report").exists()
    assert not [path.name for path in run.rglob("*part*")]

    resumed = shell("train", "--out", "run", "--resume", "--epochs", done + 1, cwd=tmp_path)
    assert resumed.code == 0, resumed.err
    assert f"epoch {done + 1}/{done + 1}" in resumed.err
    assert [row["epoch"] for row in history(run)] == list(range(1, done + 2))
    assert (run / "report" / "report.json").exists()


def test_divergence_keeps_the_last_good_epoch(capfd, tmp_path, run):
    """A good run whose checkpoint gets an absurd learning rate diverges in its third epoch."""
    import keras

    folder = tmp_path / "run"
    shutil.copytree(run.path, folder)
    state = folder / "checkpoints" / "state.keras"
    classifier = keras.saving.load_model(state)
    classifier.optimizer.learning_rate = 1e30
    classifier.save(state)
    before, rows = snapshot(folder), history(folder)

    result = call(capfd, "train", "--resume", "--out", folder, "--epochs", 9, "--quiet")
    assert (result.code, result.out) == (1, "")
    assert result.err.count("\n") == 1 and result.err.startswith("Error: ")
    assert "step " in result.err and "epoch 3" in result.err and "last.keras" in result.err
    assert "Traceback" not in result.err
    after = snapshot(folder)
    for name in ("last.keras", "best.keras", "checkpoints/state.keras"):
        assert after[name] == before[name]
    assert history(folder) == rows
    assert all(np.isfinite(value).all() for value in weights(folder / "last.keras"))
