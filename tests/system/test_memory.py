"""Memory does not grow with the number of images that an evaluation has behind it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.parity.test_parity import BACKENDS


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="resident memory is Linux's")
@pytest.mark.parametrize("backend", BACKENDS)
def test_resident_memory_is_flat_after_the_first_batch(tmp_path, backend):
    worker = Path(__file__).with_name("memory_worker.py")
    done = subprocess.run(
        [sys.executable, str(worker)],
        cwd=tmp_path,
        env={**os.environ, "KERAS_BACKEND": backend, "PYTHONPATH": str(worker.parents[2])},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads(done.stdout)
    assert told["n"] == 10_000 and told["batch_size"] < 1000
    for name in ("apgd", "fab-t", "square"):
        resident = [size for attack, size in told["resident"] if attack == name]
        assert len(resident) > 20, name
        # Allocators breathe, and JAX's arenas fill during an attack's first dozen batches; what
        # grows with the batches goes on after them.
        third = len(resident) // 3
        early, late = np.median(resident[third : 2 * third]), np.median(resident[-third:])
        assert late < early + 10, (name, resident)  # MiB; a third of one copy of the images
    assert max(size for _, size in told["resident"]) < told["resident"][1][1] + 200


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="resident memory is Linux's")
@pytest.mark.parametrize("backend", BACKENDS)
def test_twenty_trials_of_a_search(tmp_path, backend):
    worker = Path(__file__).with_name("trials_memory_worker.py")
    root = worker.parents[2]
    paths = [root, root / "cli", root / "serving"]
    done = subprocess.run(
        [sys.executable, str(worker)],
        cwd=tmp_path,
        env={
            **os.environ,
            "KERAS_BACKEND": backend,
            "PYTHONPATH": os.pathsep.join(map(str, paths)),
        },
        capture_output=True,
        text=True,
        timeout=600,
    )
    told = json.loads(done.stderr.splitlines()[-1])
    assert told["code"] == 0, done.stderr[-3000:]
    trials = told["resident"][1:]  # the first entry is of the model that is built to look
    assert len(trials) == 20
    assert trials[-1] < 1.05 * np.median(trials[2:6]), trials
