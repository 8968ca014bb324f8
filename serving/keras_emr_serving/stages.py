"""The parts of an export that need a process of their own, and how they are called.

A process has one Keras backend, and the gate one without any. Every stage computes on the CPU:
rounding of a GPU's TF32 alone is larger than the gate's tolerance.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import keras_emr
import keras_emr_serving
from keras_emr.errors import UserError
from keras_emr_serving.parity import ParityError

JOB, DATA, RESULT = "job.json", "data.npz", "result.json"
MODEL = "model"
_ERRORS = {"UserError": UserError, "ParityError": ParityError}


class ExportFailed(RuntimeError):
    """A stage ended in a way that is not the user's mistake; the message is one line."""


def run(tasks, work, backend="tensorflow"):
    """Run tasks of :mod:`keras_emr_serving.worker` in a fresh process.

    Args:
        tasks: their names.
        work: folder with ``job.json`` and ``data.npz``; what tasks make stays in it.
        backend: of Keras.

    Returns:
        The results by task, plain dictionaries.

    Raises:
        UserError, ParityError: as raised there.
        ExportFailed: the process ended without a result.
    """
    result, log = Path(work) / RESULT, Path(work) / f"{tasks[-1]}.log"
    result.unlink(missing_ok=True)
    # -P: a file of the user's in the current folder must not be taken for a module.
    command = [sys.executable, "-P", "-m", "keras_emr_serving.worker", str(work), *tasks]
    with open(log, "wb") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,  # closed when this process ends, however it does
            stdout=output,
            stderr=subprocess.STDOUT,
            env=_environment(backend),
        )
    try:
        code = process.wait()
    finally:
        process.kill()
        process.wait()
        process.stdin.close()
    try:
        told = json.loads(result.read_text())
    except (OSError, ValueError):
        raise ExportFailed(
            f"export: {' and '.join(tasks)} ended without a result (exit code {code}). "
            f"Received: {_last_line(log)!r}. Nothing is published."
        ) from None
    if "error" in told:
        raise _ERRORS[told["error"]](told["message"])
    return told


def _environment(backend):
    roots = [str(Path(m.__file__).parent.parent) for m in (keras_emr, keras_emr_serving)]
    roots += [path for path in (os.environ.get("PYTHONPATH"),) if path]
    return {
        **{k: v for k, v in os.environ.items() if k != "JAX_ENABLE_X64"},
        "PYTHONPATH": os.pathsep.join(dict.fromkeys(roots)),
        "KERAS_BACKEND": backend,
        "CUDA_VISIBLE_DEVICES": "-1",
        "JAX_PLATFORMS": "cpu",
        "TF_CPP_MIN_LOG_LEVEL": "3",
    }


def _last_line(log):
    lines = log.read_text(errors="replace").strip().splitlines()
    return lines[-1][:300] if lines else ""
