"""``keras-emr train --dry-run`` and ``--distribute``: what they print, write and refuse."""

import json
import os
import signal
import subprocess
import time

import numpy as np
import pytest

from tests.cli.harness import (
    TINY,
    assert_error,
    call,
    clean_environment,
    command,
    history,
    snapshot,
    write_data,
)


@pytest.fixture
def data(tmp_path):
    return write_data(tmp_path / "toy.npz")


def test_a_dry_run_says_what_a_run_needs_and_writes_nothing(capfd, data, tmp_path):
    before = snapshot(tmp_path)
    out = tmp_path / "run"
    words = ["--data", data, *TINY, "--epochs", 7, "--steps", 3, "--out", out]
    done = call(capfd, "train", *words, "--dry-run", "--json")
    assert done.code == 0, done.err
    found = json.loads(done.out)
    assert snapshot(tmp_path) == before
    assert found["run"] == str(out) and found["epochs"] == 7
    # 48 - 4 or so images are trained on, in batches of 16; the mlp has one device.
    assert found["steps_per_epoch"] == 3 and found["batch_size_per_device"] == 16
    passes = found["passes_per_step"]
    assert passes["backward_to_image"] == 3 and passes["differentiated_gradients"] == 1
    units = passes["in_forward_passes"]
    assert found["flops_per_step"] == 16 * units * found["forward_flops_per_example"]
    parameters = found["parameters"]
    assert parameters["trainable"] > 1000 and parameters["maximizer"] == 0
    assert found["memory_bytes_per_device"]["weights"] >= 4 * parameters["trainable"]
    steps = 7 * 3 * found["seconds_per_step"] + 7 * found["seconds_per_validation"]
    assert found["expected_hours"] == pytest.approx(steps / 3600, rel=1e-3, abs=1e-6)


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize(
    "words", [("--defense", "standard"), ("--attack", "lstm"), ("--defense", "mail-at")]
)
def test_a_dry_run_of_any_settings(capfd, data, tmp_path, words):
    out = tmp_path / "run"
    done = call(capfd, "train", "--data", data, *TINY, *words, "--dry-run", "--out", out)
    assert done.code == 0, done.err
    assert f"{out} (nothing was written)" in done.out and not out.exists()
    assert ("maximizer 450" in done.out) == ("lstm" in words)


@pytest.mark.parametrize(
    ("words", "fragments"),
    [
        (("--devices", 2), ("devices", "Add --distribute data")),
        (("--distribute", "data", "--coordinator", "h:1"), ("go together",)),
        (
            ("--distribute", "data", "--coordinator", "h:1", "--processes", 2, "--process", 1),
            ("TensorFlow has no coordinator", "TF_CONFIG"),
        ),
    ],
)
def test_what_cannot_be_shared_is_said_in_one_line(capfd, data, tmp_path, words, fragments):
    done = call(capfd, "train", "--data", data, *TINY, *words, "--out", tmp_path / "run")
    assert_error(done, 3, *fragments)
    assert not (tmp_path / "run").exists()


def test_a_single_device_can_be_distributed_and_says_so(capfd, data, tmp_path):
    same = []
    for words in (("--distribute", "data"), ("--quiet",)):
        out = tmp_path / f"run{len(same)}"
        done = call(capfd, "train", "--data", data, *TINY, *words, "--out", out)
        assert done.code == 0, done.err
        same.append(history(out))
        if not len(same) > 1:
            assert "one device" in done.err and "nothing to share" in done.err
    for one, other in zip(*same, strict=True):
        assert one == pytest.approx(other, abs=1e-5)


@pytest.mark.slow
@pytest.mark.long
def test_two_processes_of_one_machine_stop_together_and_resume(data, tmp_path):
    """torch: SIGTERM for one of them; the run goes on, on one device, as if never stopped."""
    words = ["--backend", "torch", "--data", data, *TINY, "--defense", "at", "--emr", 0]
    environment = clean_environment(OMP_NUM_THREADS="1")
    shared = ["--distribute", "data", "--devices", 2]
    out = tmp_path / "run"
    job = subprocess.Popen(
        command("train", *words, *shared, "--epochs", 500, "--out", out),
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
    )
    began = time.monotonic()
    while not (out / "history.jsonl").exists() and time.monotonic() - began < 200:
        time.sleep(0.2)
    listed = subprocess.run(["ps", "-o", "pid=", "--ppid", str(job.pid)], capture_output=True)
    *_, last = map(int, listed.stdout.split())
    os.kill(last, signal.SIGTERM)
    _, said = job.communicate(timeout=200)
    assert job.returncode == 75 and said.count("Error: interrupted") == 1, said
    finished = len(history(out))
    done = subprocess.run(
        command("train", "--resume", "--epochs", finished + 1, "--out", out, "--quiet"),
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    alone = tmp_path / "alone"
    subprocess.run(
        command("train", *words, "--epochs", finished + 1, "--out", alone, "--quiet"),
        env=environment,
        capture_output=True,
        check=True,
        timeout=300,
    )
    losses = [[row["loss"] for row in history(run)] for run in (out, alone)]
    np.testing.assert_allclose(*losses, atol=1e-4)
