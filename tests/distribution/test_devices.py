"""The same global batch gives the same global loss on one device and on several, to 1e-5.

Every run is a process of its own (``cases.py``): devices are chosen before a backend begins.
"""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.distribution.cases import CASES
from tests.processes import environment

ROOT = Path(__file__).parents[2]
# Statistics are a device's own on tensorflow and torch: the losses differ, as the README says.
NO_BATCH_NORM = [name for name in CASES if name != "batch-norm"]


def start(backend, out, names, *words, **more):
    return start_module(backend, "cases", str(out), ",".join(names), *words, **more)


def start_module(backend, module, *words, **more):
    threads = {"OMP_NUM_THREADS": "1", "TF_NUM_INTRAOP_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", f"tests.distribution.{module}", *words],
        env=environment(
            backend,
            JAX_ENABLE_X64="0",
            PYTHONPATH=os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
            **threads,
            **more,
        ),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(*children):
    said = [child.communicate(timeout=500)[0] for child in children]
    for child, text in zip(children, said, strict=True):
        assert child.returncode == 0, text[-3000:]


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def join(count):
    """Arguments of ``count`` processes of one job."""
    place = [f"coordinator=127.0.0.1:{free_port()}", f"processes={count}"]
    return [[*place, f"process={i}"] for i in range(count)]


def assert_same(expected, found, names):
    for name in names:
        one, many = expected[name], found[name]
        assert one.keys() == many.keys()
        for key, values in one.items():
            # The attack of validation starts at noise for the batches that it is given, of one
            # example and of several devices alike; the maximizer magnifies its rounding.
            tolerance = {"weights": 1e-4, "val_learned_loss": 1e-3}.get(key, 1e-5)
            assert many[key] == pytest.approx(values, abs=tolerance, rel=1e-6), (name, key)
        assert len(set(one["loss"])) == 4  # it learned


def compare(tmp_path, backend, names, *jobs, **more):
    """Each job is a list of processes' arguments."""
    alone = tmp_path / "alone.json"
    finish(start(backend, alone, names))
    expected = json.loads(alone.read_text())
    for number, job in enumerate(jobs):
        outs = [tmp_path / f"{number}-{i}.json" for i in range(len(job))]
        finish(*(start(backend, out, names, *words) for out, words in zip(outs, job, strict=True)))
        assert_same(expected, json.loads(outs[0].read_text()), names)
        assert not any(out.exists() for out in outs[1:])  # only process 0 writes


def both(tmp_path, backend, names, job):
    """As ``compare``, for one job, whose process 0 goes on alone: quicker."""
    outs = [tmp_path / f"{i}.json" for i in range(len(job))]
    job = [[*words, "alone=1"] for words in job]
    finish(*(start(backend, out, names, *words) for out, words in zip(outs, job, strict=True)))
    found = json.loads(outs[0].read_text())
    assert_same(found["alone"], found["shared"], names)
    assert not any(out.exists() for out in outs[1:])


@pytest.mark.slow
def test_four_devices_on_jax(tmp_path):
    """One program on global arrays: BatchNorm's statistics are global as well."""
    both(tmp_path, "jax", ["batch-norm", "rnn-trades"], [["devices=4"]])


@pytest.mark.slow
def test_two_processes_on_torch(tmp_path):
    both(tmp_path, "torch", ["trades-emr", "rnn-trades"], join(2))


@pytest.mark.slow
def test_a_resumed_epoch_has_every_processs_own_dropout(tmp_path):
    """torch's stream of each process is in process 0's checkpoint: resumed = uninterrupted."""
    out = tmp_path / "out.json"
    finish(
        *(start_module("torch", "resumed", str(out), str(tmp_path), *words) for words in join(2))
    )
    found = json.loads(out.read_text())
    assert found["where"] == "epoch 2, step 3"
    assert found["resumed"] == found["whole"]


@pytest.mark.slow
@pytest.mark.long
def test_everything_on_two_processes_of_torch(tmp_path):
    both(tmp_path, "torch", NO_BATCH_NORM, join(2))


@pytest.mark.slow
@pytest.mark.long
def test_devices_and_processes_on_jax(tmp_path):
    names = list(CASES)
    jobs = [[[f"devices={n}"]] for n in (1, 2, 4)]
    compare(tmp_path, "jax", names, *jobs, join(2))


@pytest.mark.slow
def test_two_replicas_on_tensorflow(tmp_path):
    both(tmp_path, "tensorflow", ["trades-emr", "rnn-trades"], [["devices=2"]])


@pytest.mark.slow
@pytest.mark.long
def test_everything_on_two_replicas_of_tensorflow(tmp_path):
    both(tmp_path, "tensorflow", NO_BATCH_NORM, [["devices=2"]])


@pytest.mark.slow
@pytest.mark.long
def test_two_workers_on_tensorflow(tmp_path):
    addresses = [f"127.0.0.1:{free_port()}" for _ in range(2)]
    alone, outs = tmp_path / "alone.json", [tmp_path / f"{i}.json" for i in range(2)]
    finish(start("tensorflow", alone, ["at"]))
    tasks = [
        {"cluster": {"worker": addresses}, "task": {"type": "worker", "index": i}} for i in range(2)
    ]
    finish(
        *(
            start("tensorflow", out, ["at"], "devices=1", TF_CONFIG=json.dumps(task))
            for out, task in zip(outs, tasks, strict=True)
        )
    )
    assert_same(json.loads(alone.read_text()), json.loads(outs[0].read_text()), ["at"])
    assert not outs[1].exists()


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize(("backend", "job"), [("tensorflow", [["devices=2"]]), ("torch", None)])
def test_batch_norm_of_replicas_trains_and_keeps_one_set_of_statistics(tmp_path, backend, job):
    """Its losses are those of per-device statistics: finite, and near the single device's."""
    job, names = job or join(2), ["batch-norm"]
    outs = [tmp_path / f"{i}.json" for i in range(len(job))]
    finish(*(start(backend, out, names, *words) for out, words in zip(outs, job, strict=True)))
    found = json.loads(outs[0].read_text())["batch-norm"]
    assert found["loss"][-1] < found["loss"][0]
