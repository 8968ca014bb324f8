"""What happens before keras is imported: the backend is chosen, checked and tuned."""

from __future__ import annotations

import ctypes
import gc
import importlib
import importlib.util
import logging
import os
import signal
import sys
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path

from keras_emr.errors import UserError

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # <malloc.h>
_EXTRA = {"jax": "keras-emr[jax]", "torch": "keras-emr[torch]", "tensorflow": "keras-emr"}


def select_backend(name: str) -> None:
    """Make ``name`` the Keras backend of this process. Raises :class:`UserError` if missing."""
    if importlib.util.find_spec(name) is None:
        raise UserError(
            f"--backend: {name} is not installed. Received: {name!r}. "
            f"Install it with: pip install '{_EXTRA[name]}'"
        )
    os.environ["KERAS_BACKEND"] = name
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    _use_onednn()
    if name == "jax":
        _tune_xla()
        _keep_compiled()
    if name == "torch":
        _keep_freed_memory()
    logging.getLogger("tensorflow").setLevel(logging.ERROR)
    with _silent_stderr(), _uncollected():
        importlib.import_module("keras")
        if importlib.util.find_spec("tensorflow"):
            # Keras loads it on every backend anyway, as soon as a seed is set or a model is saved.
            importlib.import_module("tensorflow")


def require_tensorboard() -> None:
    """Raise :class:`UserError` where tensorboard is not installed."""
    if importlib.util.find_spec("tensorboard") is None:
        raise UserError(
            "tensorboard is not installed. Received: --tensorboard. Install it with: "
            "pip install 'keras-emr[tune]'"
        )


def require_tuner(search: str) -> None:
    """Raise :class:`UserError` where a package that this kind of search needs is missing."""
    needed = ["keras_tuner", "tensorboard"]  # KerasTuner imports it on the TensorFlow backend
    if search == "bayesian":
        needed += ["sklearn", "scipy"]
    for name in needed:
        if importlib.util.find_spec(name) is None:
            raise UserError(
                f"{name.replace('_', '-')} is not installed. Received: --search {search}. Install "
                "it with: pip install 'keras-emr[tune]'"
            )


@contextmanager
def quiet_tensorflow():
    """Within the block TensorFlow can be imported without its greetings on stderr."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # its C core writes to stderr as well
    _use_onednn()
    with _silent_stderr():
        yield


@contextmanager
def _uncollected():
    """Keep Python's garbage collector from what there is after imports in the block."""
    # Hundreds of thousands of objects that stay: a full collection would look at them all again.
    if "keras" in sys.modules or not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


@contextmanager
def _silent_stderr():
    # TensorFlow's libraries greet on file descriptor 2 while they load, whatever the log level.
    sys.stderr.flush()
    kept = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def _use_onednn():
    # TensorFlow turns it on by itself for some processors only, and adversarial steps are faster on
    # the others too; results differ by rounding, a server's errors in wording.
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")


# Unknown flags make XLA abort, so they are set for the versions they were measured with.
_XLA_FLAGS = {
    # An unrolled attack's memory is cut nine-fold and its time by a fifth.
    "--xla_cpu_enable_concurrency_optimized_scheduler": "false",
    # Convolutions by Eigen and not by YNNPACK: a third of an adversarial step of the small CNN.
    "--xla_cpu_experimental_ynn_fusion_type": "",
}


def _tune_xla():
    given = os.environ.get("XLA_FLAGS", "")
    version = tuple(int(part) for part in metadata.version("jaxlib").split(".")[:2])
    if version == (0, 10):
        more = [f"{flag}={value}" for flag, value in _XLA_FLAGS.items() if flag not in given]
        os.environ["XLA_FLAGS"] = " ".join([given, *more]).strip()


def _keep_compiled():
    # The second start of the same training compiles nothing: half of its time until the first step.
    base = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(base / "keras_emr" / "xla"))


def _keep_freed_memory():
    # The C library hands large blocks back to the system and fetches them again, page by page, in
    # every step: a fifth of the time of training a learned maximizer on CPU.
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt is not None:  # glibc
        if "MALLOC_TRIM_THRESHOLD_" not in os.environ:
            mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
        if "MALLOC_MMAP_THRESHOLD_" not in os.environ:
            mallopt(_M_MMAP_THRESHOLD, 2**25)


@contextmanager
def signals_to(stop):
    """Within the block, Ctrl-C and SIGTERM trip ``stop``; a second Ctrl-C ends at once."""

    def handler(number, frame):
        if stop.requested is not None:
            raise KeyboardInterrupt
        stop.requested = number
        print("stopping after this step ...", file=sys.stderr, flush=True)

    previous = {n: signal.signal(n, handler) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, old in previous.items():
            signal.signal(number, old)
