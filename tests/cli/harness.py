"""Ways to call the command line, and what every mistake's message must look like."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from keras_emr_cli.main import main

# The quickest evaluation.
ONLY_PGD = (
    *("--attacks", "pgd", "--steps", 1, "--restarts", 1, "--extra-examples", 0, "--overwrite"),
)
# The smallest run there is; later flags win over these.
TINY = (
    *("--model", "mlp", "--epochs", "1", "--steps", "2", "--val-steps", "2", "--eval-steps", "2"),
    *("--eval-restarts", "1", "--batch-size", "16", "--no-baseline"),
)


@dataclass(frozen=True)
class Result:
    code: int
    out: str
    err: str


def call(capfd, *arguments):
    """Run the command line in this process."""
    capfd.readouterr()
    try:
        main([str(a) for a in arguments])
    except SystemExit as stop:
        captured = capfd.readouterr()
        return Result(stop.code, captured.out, captured.err)
    raise AssertionError("main returned instead of exiting")


def clean_environment(**extra):
    """The environment of a user's shell: without what tests/conftest.py sets, CPU only."""
    ours = ("KERAS_BACKEND", "JAX_ENABLE_X64", "TF_CPP_MIN_LOG_LEVEL")
    kept = {k: v for k, v in os.environ.items() if k not in ours and "KERAS_EMR_" not in k}
    return {**kept, "CUDA_VISIBLE_DEVICES": "-1", **extra}


def command(*arguments):
    return [sys.executable, "-m", "keras_emr_cli.main", *map(str, arguments)]


def shell(*arguments, cwd=None, **environment):
    """Run the command line in a process of its own."""
    return python(*command(*arguments)[1:], cwd=cwd, **environment)


def python(*arguments, cwd=None, **environment):
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=cwd,
        env=clean_environment(**environment),
        capture_output=True,
        text=True,
        timeout=300,
    )
    return Result(done.returncode, done.stdout, done.stderr)


def assert_error(result, code, *fragments):
    """One line on stderr that starts with ``Error:`` and contains ``fragments``; no results."""
    assert "Traceback" not in result.err
    assert result.err.count("\n") == 1 and result.err.startswith("Error: "), result.err
    for fragment in fragments:
        assert fragment in result.err
    assert result.out == ""
    assert result.code == code


def snapshot(folder):
    """Relative path -> content hash of every file, ``None`` for folders."""
    folder = Path(folder)
    return {
        str(path.relative_to(folder)): None
        if path.is_dir()
        else hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
    }


def arrays(classes=2, shape=(8, 8, 1), n=60, n_test=20, **changes):
    """A learnable toy data set: each class is bright in a row of its own."""
    rng = np.random.default_rng(0)
    made = {}
    for part, size in (("train", n), ("test", n_test)):
        y = np.arange(size) % classes
        x = rng.uniform(0, 0.5, (size, *shape)).astype("float32")
        x[np.arange(size), y * shape[0] // classes] += 0.5
        made |= {f"x_{part}": x, f"y_{part}": y}
    return {**made, **changes}


def write_data(path, **options):
    np.savez(path, **arrays(**options))
    return path


def history(run):
    """The rows of ``history.jsonl`` without the times."""
    rows = [json.loads(line) for line in (Path(run) / "history.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k != "seconds"} for row in rows]


def weights(path):
    """The arrays of a saved model."""
    import keras

    return keras.saving.load_model(path, compile=False).get_weights()
