"""One version of a model: loading it, warming it up, and knowing when its files have changed."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from keras_emr_serving.server import inference, warmup
from keras_emr_serving.server.metrics import Metrics
from keras_emr_serving.server.servable import Servable
from keras_emr_serving.server.status import ServingError, from_exception


def _nothing():
    pass


@dataclass
class Version:
    """``state``: START, LOADING, AVAILABLE, UNLOADING or END. ``error``: why it is not served.

    ``failures``: how often in a row it could not be loaded, with the same files (``fingerprint``).
    """

    number: int
    path: Path
    state: str = "START"
    error: ServingError | None = None
    servable: Servable | None = None
    model: inference.Model | None = None
    users: int = 0
    fingerprint: tuple = ()
    failures: int = 0
    retry_at: float = 0.0
    stop: Callable[[], None] = _nothing

    def release(self) -> None:
        """End batching and give the memory back. Only when nobody uses it any more."""
        servable, stop = self.servable, self.stop
        self.servable = self.model = None
        self.stop = _nothing
        try:
            stop()
        finally:
            servable.close()


def load(name: str, path: Path, metrics: Metrics, batcher: Callable | None = None):
    """Load the version in ``path`` of the model ``name`` and replay its warm-up records.

    Returns:
        The servable, the model that requests run on, and what stops its batching.

    Raises:
        ServingError: whatever went wrong; nothing of it stays in memory.
    """
    servable = None

    def on_runtime(api, microseconds):
        metrics.runtime_latency.labels(name, api, "TF1").observe(microseconds)

    def model(run):
        return inference.Model(servable.signatures, run, on_runtime=on_runtime)

    try:
        servable = Servable(path)
        _warm_up(path, model(servable.run), metrics)
        run, stop = (servable.run, _nothing) if batcher is None else batcher(servable)
    except Exception as error:
        if servable is not None:
            servable.close()
        metrics.load(path, "fail")
        raise _load_error(error) from error
    metrics.load(path, "success")
    return servable, model(run), stop


def _warm_up(path, model, metrics):
    if not (path / warmup.FILE).exists():
        return
    start, status = time.perf_counter(), "OK"
    try:
        warmup.replay(path, model)
    except ServingError as error:
        status = error.code
        raise
    finally:
        elapsed = (time.perf_counter() - start) * 1e6
        metrics.warmup_latency.labels(str(path), status).observe(elapsed)


def _load_error(error):
    found = from_exception(error)
    if found is not error and not hasattr(error, "error_code"):
        found = ServingError("UNKNOWN", str(error) or type(error).__name__)
    return found


def fingerprint(path: Path) -> tuple:
    """Changes when a file of the version does."""
    try:
        files = sorted(one for one in path.rglob("*") if one.is_file())
        return tuple((str(f), f.stat().st_mtime_ns, f.stat().st_size) for f in files)
    except OSError:
        return ()
