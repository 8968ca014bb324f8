"""Memory does not grow with the images that an evaluation, or the epochs that a run, has behind."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.parity.test_parity import BACKENDS

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="resident memory is Linux's"),
    pytest.mark.parametrize(
        "backend",
        [BACKENDS[0], *(pytest.param(name, marks=pytest.mark.long) for name in BACKENDS[1:])],
    ),
]


def told_by(worker, folder, backend, stream="stdout"):
    """What a worker in ``folder`` prints last."""
    root = Path(__file__).parents[2]
    paths = os.pathsep.join(map(str, [root, root / "cli", root / "serving"]))
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name(worker))],
        cwd=folder,
        env={**os.environ, "KERAS_BACKEND": backend, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(getattr(done, stream).splitlines()[-1])


def test_resident_memory_is_flat_after_the_first_batch(tmp_path, backend):
    told = told_by("memory_worker.py", tmp_path, backend)
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


@pytest.mark.long
def test_200_epochs_of_a_run_take_no_more_memory_than_20(tmp_path, backend):
    """Batches, steps, validation with averaged weights, margins, models and checkpoints."""
    resident = told_by("epochs_worker.py", tmp_path, backend)
    assert len(resident) == 200
    early, late = np.median(resident[20:30]), np.median(resident[-10:])
    assert late < 1.05 * early, resident


@pytest.mark.long
def test_twenty_trials_of_a_search(tmp_path, backend):
    told = told_by("trials_memory_worker.py", tmp_path, backend, "stderr")
    assert told["code"] == 0
    trials = told["resident"][1:]  # the first entry is of the model that is built to look
    assert len(trials) == 20
    assert trials[-1] < 1.05 * np.median(trials[2:6]), trials
