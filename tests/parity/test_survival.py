"""The same examples survive on every backend."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.parity.test_parity import BACKENDS
from tests.processes import environment

pytestmark = [pytest.mark.slow, pytest.mark.long]


@pytest.fixture(scope="module")
def survivors(tmp_path_factory):
    folder = tmp_path_factory.mktemp("survival")
    found = {}
    for backend in BACKENDS:
        target = folder / f"{backend}.npz"
        worker = Path(__file__).with_name("survival_worker.py")
        done = subprocess.run(
            [sys.executable, str(worker), str(folder / "model.keras"), str(target)],
            env=environment(backend, JAX_ENABLE_X64="0", PYTHONPATH=str(worker.parents[2])),
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        found[backend] = dict(np.load(target))
        assert str(found[backend].pop("backend")) == backend
    return found


@pytest.mark.parametrize("name", ["correct", "apgd-ce", "fab"])
def test_flags_agree_on_99_of_100_examples(survivors, name):
    reference = survivors["tensorflow"][name]
    assert len(reference) == 500
    if name != "correct":  # an attack that breaks some and leaves some
        assert 0.2 < reference.mean() < survivors["tensorflow"]["correct"].mean() - 0.1
    for backend in BACKENDS[1:]:
        flags = survivors[backend][name]
        assert (flags == reference).mean() >= 0.99, backend
        assert abs(flags.mean() - reference.mean()) <= 0.005, backend
