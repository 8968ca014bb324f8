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
from keras_emr_serving.export.parity import ParityError

JOB, DATA = "job.json", "data.npz"
MODEL = "model"
_ERRORS = {"UserError": UserError, "ParityError": ParityError}


class ExportFailed(RuntimeError):
    """A stage ended in a way that is not the user's mistake; the message is one line."""


def run(tasks, work, backend="tensorflow"):
    """Run tasks of :mod:`keras_emr_serving.export.worker` in a fresh process.

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
    # -P: a file of the user's in the current folder must not be taken for a module.
    command = [sys.executable, "-P", "-m", "keras_emr_serving.export.worker", str(work), *tasks]
    # The child reads from a pipe that ends when this process does, however it does. It answers
    # through another one: a file could not be written to a full disk.
    alive, held = os.pipe()
    try:
        process = subprocess.Popen(
            command,
            stdin=alive,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=_environment(backend),
        )
        try:
            out, log = process.communicate()
        finally:
            process.kill()
            process.wait()
    finally:
        os.close(alive)
        os.close(held)
    try:
        told = json.loads(out)
    except ValueError:
        raise ExportFailed(
            f"export: {' and '.join(tasks)} ended without a result (exit code "
            f"{process.returncode}). Received: {_last_line(log)!r}. Nothing is published."
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
    lines = log.decode(errors="replace").strip().splitlines()
    return lines[-1][:300] if lines else ""
