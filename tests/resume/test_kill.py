"""Killed with signal 9 at 20 random moments, inside a save included: nothing is lost."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.builders import assert_same_arrays, newest_checkpoint
from tests.processes import environment
from tests.resume import runs

KILLS = 20


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("backend", ["tensorflow", "jax"])
@pytest.mark.parametrize("method", ["at", "rnn-trades"])
def test_killed_at_random_moments(tmp_path, method, backend):
    worker = Path(__file__).with_name("kill_worker.py")
    caches = {
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "cache"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    done = subprocess.run(
        [sys.executable, str(worker), method, str(tmp_path), str(KILLS), "0"],
        env=environment(backend, PYTHONPATH=":".join(sys.path), **caches),
        capture_output=True,
        text=True,
        timeout=3000,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])["found"]
    assert len(found) == KILLS
    assert any(name.startswith(".") for names in found for name in names)  # inside a save
    steps = {name[name.index("-step-") :] for names in found for name in names if "-step-" in name}
    assert len(steps) > KILLS // 2
    assert "Warning" not in done.stderr  # no checkpoint was found damaged
    parts, whole = tmp_path / "parts", tmp_path / "whole"
    assert runs.history(parts) == runs.history(whole) and len(runs.history(whole)) == 16
    (_, one), (_, other) = newest_checkpoint(parts), newest_checkpoint(whole)
    assert_same_arrays(one, other)
    assert_same_arrays(runs.models(parts), runs.models(whole))
