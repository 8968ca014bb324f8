"""Ctrl-C, SIGTERM and divergence: the last good state is kept, and training can go on."""

import errno
import re
import shutil
import signal
import subprocess
import time

import numpy as np
import pytest

from tests.builders import assert_same_arrays, newest_checkpoint
from tests.cli.harness import (
    TINY,
    assert_error,
    call,
    clean_environment,
    command,
    history,
    shell,
    snapshot,
    weights,
    write_data,
)


def stop_after_first_epoch(arguments, number, cwd, environment):
    """Send ``number`` once the first epoch is reported: (code, later stderr, stdout, seconds)."""
    process = subprocess.Popen(
        command(*arguments),
        cwd=cwd,
        env=clean_environment(**environment),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        # Stops at the end of the stream too, where the process fails early.
        for line in process.stderr:
            if "epoch 1/" in line:
                break
        process.send_signal(number)
        sent = time.perf_counter()
        out, err = process.communicate(timeout=60)
        return process.returncode, err, out, time.perf_counter() - sent
    finally:
        process.kill()


@pytest.mark.parametrize(
    ("number", "code", "backend"),
    [
        (signal.SIGINT, 130, "tensorflow"),
        pytest.param(signal.SIGTERM, 75, "torch", marks=[pytest.mark.slow, pytest.mark.long]),
        pytest.param(signal.SIGTERM, 75, "jax", marks=pytest.mark.slow),
    ],
    ids=["SIGINT-tensorflow", "SIGTERM-torch", "SIGTERM-jax"],
)
def test_a_signal_stops_a_run_that_can_go_on(capfd, tmp_path, jax_cache, number, code, backend):
    # As in test_run.py, so that JAX finds the programs compiled.
    data = write_data(tmp_path / "three.npz", classes=3)
    arguments = [*TINY, "--steps", 1, "--val-steps", 1, "--eval-steps", 1, "--data", data]
    arguments += ["--backend", backend, "--out", "run", "--epochs", 10_000]
    ended, err, out, seconds = stop_after_first_epoch(
        ["train", *arguments], number, tmp_path, jax_cache
    )
    assert (ended, out) == (code, ""), err
    assert seconds < 20
    assert "Traceback" not in err
    (line,) = [line for line in err.splitlines() if line.startswith("Error: ")]
    assert err.splitlines()[-1] == line
    for fragment in (number.name, "last.keras", "keras-emr train --out run --resume"):
        assert fragment in line

    # The checkpoint is of the moment that the line names.
    run = tmp_path / "run"
    done = len(history(run))
    state, arrays = newest_checkpoint(run)
    epoch, step = map(int, re.search(r"at epoch (\d+), step (\d+);", line).groups())
    assert (state["epoch"] + 1, state["step"]) == (epoch, step)
    assert epoch == done + 1 >= 2
    assert all(
        np.isfinite(value).all() for value in [*arrays.values(), *weights(run / "last.keras")]
    )
    assert not (run / "report").exists()
    assert not [path.name for path in run.rglob("*part*")]

    resumed = shell(
        "train", "--out", "run", "--resume", "--epochs", done + 1, cwd=tmp_path, **jax_cache
    )
    assert resumed.code == 0, resumed.err
    assert f"epoch {done + 1}/{done + 1}" in resumed.err
    assert [row["epoch"] for row in history(run)] == list(range(1, done + 2))
    assert (run / "report" / "training.json").exists()
    if backend == "tensorflow":  # as this process
        whole = call(capfd, "train", *arguments, "--out", tmp_path / "whole", "--epochs", done + 1)
        assert whole.code == 0, whole.err
        assert history(tmp_path / "whole") == history(run)
        (_, one), (_, other) = newest_checkpoint(tmp_path / "whole"), newest_checkpoint(run)
        assert_same_arrays(one, other)


def test_divergence_keeps_the_last_good_epoch(capfd, tmp_path, run, monkeypatch):
    """A good run that is resumed with an absurd learning rate diverges in its third epoch."""
    from keras_emr.training import snapshot as state

    folder = tmp_path / "run"
    shutil.copytree(run.path, folder)
    restore = state.restore

    def too_fast(classifier, arrays):
        restore(classifier, arrays)
        classifier.optimizer.learning_rate = 1e30

    monkeypatch.setattr(state, "restore", too_fast)
    before, rows = snapshot(folder), history(folder)

    result = call(capfd, "train", "--resume", "--out", folder, "--epochs", 9, "--quiet")
    assert (result.code, result.out) == (1, "")
    assert result.err.count("\n") == 1 and result.err.startswith("Error: ")
    assert "step " in result.err and "epoch 3" in result.err and "last.keras" in result.err
    assert "Traceback" not in result.err
    after = snapshot(folder)
    kept = [name for name in before if name.endswith(".keras") or "checkpoints/" in name]
    assert len(kept) > 10
    for name in kept:
        assert after[name] == before[name]
    assert history(folder) == rows
    assert all(np.isfinite(value).all() for value in weights(folder / "last.keras"))


@pytest.mark.slow
def test_a_run_that_ended_in_its_first_epoch_starts_again(
    capfd, tmp_path, data, monkeypatch, recwarn
):
    """However it ended: here a Ctrl-C that no callback saw, before the first step was taken."""
    from keras_emr.training.callbacks import StopOnNonFinite

    def interrupted(self, epoch, logs=None):
        raise KeyboardInterrupt

    arguments = ["train", *TINY, "--data", data, "--steps", 1, "--val-steps", 1]
    assert call(capfd, *arguments, "--out", "whole").code == 0
    with monkeypatch.context() as patch:
        patch.setattr(StopOnNonFinite, "on_epoch_begin", interrupted)
        stopped = call(capfd, *arguments, "--out", "parts")
        assert (stopped.code, stopped.err.strip()) == (130, "Error: interrupted")
    assert not (tmp_path / "parts" / "history.jsonl").exists()

    result = call(capfd, "train", "--out", "parts", "--resume")
    assert result.code == 0
    # A shell would show them.
    assert not [str(w.message) for w in recwarn if issubclass(w.category, UserWarning)]
    (line,) = result.err.splitlines()
    assert line.startswith("trades + EMR  epoch 1/1  ")
    assert history("parts") == history("whole")
    pairs = zip(weights("parts/last.keras"), weights("whole/last.keras"), strict=True)
    for a, b in pairs:
        np.testing.assert_array_equal(a, b)


def test_a_full_disk_ends_a_run_with_one_line(capfd, tmp_path, data, monkeypatch):
    """At the checkpoint of the second epoch's end; once there is room the run goes on."""
    arguments = ["train", *TINY, "--data", data, "--steps", 1, "--val-steps", 1, "--epochs", 2]
    arguments += ["--quiet", "--out", "run"]
    real, calls = np.savez, []

    def full_disk(*args, **kwargs):
        calls.append(args)
        if len(calls) == 3:  # after the initial one and the first epoch's
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(np, "savez", full_disk)
        result = call(capfd, *arguments)
    where = "run/checkpoints/epoch-00003-step-0000000"
    again = "keras-emr train --out run --resume"
    assert_error(result, 1, "cannot write: No space left on device", where, again)
    assert not list(tmp_path.rglob("*part*")) and not (tmp_path / "run" / "report").exists()
    (state, _) = newest_checkpoint("run")
    assert (state["epoch"], state["step"]) == (1, 0)
    assert call(capfd, "train", "--resume", "--out", "run", "--quiet").code == 0
    assert [row["epoch"] for row in history("run")] == [1, 2]
    assert newest_checkpoint("run")[0]["epoch"] == 2
