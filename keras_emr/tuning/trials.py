"""A trial: proposed by a study, run in a folder of its own, told back. Knows no tuner."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from keras_emr.errors import NotWritten, UserError
from keras_emr.training.run_folder import RunFolder
from keras_emr.tuning import OBJECTIVES

_LOCK_SECONDS = 60.0


@dataclass(frozen=True)
class Trial:
    """What a study proposes.

    ``values``: by parameter, those of the space that are active. ``epochs``: train up to this one;
    ``None``: as the settings say. ``continues``: name of the trial whose run it goes on from.
    """

    name: str
    values: Mapping[str, Any]
    epochs: int | None = None
    continues: str | None = None


class Study(Protocol):
    """Who proposes trials. To add another tuner is to write these two methods."""

    def ask(self) -> Trial | None:
        """The next trial, or the one that was not told yet; ``None``: the search is over."""

    def tell(self, trial: Trial, result: Result) -> None:
        """The trial has ended: ``result.score`` is to be maximised, ``None`` where it failed."""


@dataclass(frozen=True)
class Result:
    """How a trial ended, as ``result.json`` in its folder keeps it.

    ``status``: ``completed``, ``stopped`` (hopeless), ``diverged`` or ``failed``. ``epoch``: the
    one of ``best.keras``; ``score``, ``clean`` and ``robust`` are its objective and accuracies
    (clean and under the cheap attack) on validation data. ``message``: one line where it failed.
    """

    trial: str
    status: str
    values: Mapping[str, Any]
    score: float | None = None
    clean: float | None = None
    robust: float | None = None
    epoch: int | None = None
    epochs: int = 0
    seconds: float = 0.0
    continues: str | None = None
    message: str | None = None

    @property
    def ok(self) -> bool:
        return self.status != "failed"


@dataclass
class TrialRunner:
    """Runs a trial in ``folder/NAME``, which goes on where it was killed.

    Args:
        folder: of all trials.
        train: ``train(trial, path, callbacks)`` trains the trial's classifier in the run folder
            ``path``, taking up what is there, and returns a
            :class:`keras_emr.training.experiment.TrainedRun`.
        objective: key of ``history.jsonl``, to be maximised.
        rule: :class:`keras_emr.tuning.stopping.MedianRule` or ``None``.
        errors: folder for the tracebacks of trials that failed.
    """

    folder: Path
    train: Callable
    objective: str = OBJECTIVES[0]
    rule: Any = None
    errors: Path = field(default=Path("errors"))

    def __call__(self, trial: Trial) -> Result:
        path = self.folder / trial.name
        with locked(path), memory_released():
            done = read_result(path)
            if done is None or not done.ok:  # killed after it ended, before it was told
                done = self._run(trial, path)
                RunFolder.write_json(path / "result.json", asdict(done))
        return done

    def _run(self, trial, path):
        from keras_emr.training.callbacks import Interrupted, TrainingDiverged
        from keras_emr.tuning.stopping import StopHopeless

        began = time.perf_counter()
        facts = {"trial": trial.name, "values": dict(trial.values), "continues": trial.continues}
        status, message = "completed", None
        try:
            if trial.continues is not None:
                _take_up(self.folder / trial.continues, path)
            callbacks = []
            if self.rule is not None:
                callbacks.append(StopHopeless(self.rule, trial.name, self.objective))
                if done := callbacks[0].check():  # killed when it was to stop
                    trial = replace(trial, epochs=done)
            rows = self.train(trial, path, callbacks).history
            if any(callback.stopped for callback in callbacks):
                status = "stopped"
        except TrainingDiverged as error:
            status, message = "diverged", str(error)
            rows = RunFolder(path).read_history()
        except (Interrupted, NotWritten, KeyboardInterrupt):
            raise  # no fault of the trial, which can be resumed
        except Exception as error:  # a trial may fail in any way; the others go on
            if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
                raise  # the others would, too
            text = traceback.format_exc()
            if not isinstance(error, UserError):
                self.errors.mkdir(parents=True, exist_ok=True)
                RunFolder.write_text(self.errors / f"{trial.name}.txt", text)
            line = " ".join(str(error).split()) or type(error).__name__
            kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
            return Result(status="failed", message=kind + line, **facts)
        seconds = sum(row["seconds"] for row in rows) or time.perf_counter() - began
        if not rows:  # diverged in its first epoch: no model, and no accuracy is below 0
            return Result(status=status, score=0.0, message=message, **facts)
        best = best_row(rows)
        if best[self.objective] is None:
            text = f"{self.objective} is not defined in epoch {best['epoch']}"
            return Result(status="failed", message=text, **facts)
        return Result(
            status=status,
            score=float(best[self.objective]),
            clean=best["val_accuracy"],
            robust=best.get("val_robust_accuracy"),
            epoch=best["epoch"],
            epochs=len(rows),
            seconds=round(seconds, 1),
            message=message,
            **facts,
        )


def best_row(rows):
    """The row of the epoch that ``best.keras`` is from."""
    monitored = "val_robust_accuracy" if "robust_accuracy" in rows[0] else "val_accuracy"
    return max(rows, key=lambda row: row[monitored])


def read_result(path) -> Result | None:
    """The result in a trial's folder, or ``None``."""
    try:
        return Result(**json.loads((Path(path) / "result.json").read_text()))
    except FileNotFoundError:
        return None


@contextlib.contextmanager
def memory_released():
    """A block after which nothing of the models made within it stays in memory."""
    import keras

    from keras_emr import backend

    with backend.released():
        yield
    keras.utils.clear_session(free_memory=True)


@contextlib.contextmanager
def locked(path, seconds=_LOCK_SECONDS):
    """Hold ``path`` against other processes; it is free again however this one ends.

    Raises :class:`UserError` if another process keeps it for ``seconds``.
    """
    import fcntl

    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    with open(path / ".lock", "w") as file:
        until = time.monotonic() + seconds
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError:
                if time.monotonic() >= until:
                    raise UserError(
                        f"another process works in this folder. Received: {str(path)!r}. Wait for "
                        "it, or end it."
                    ) from None
                time.sleep(0.2)
        yield


def _take_up(before, path):
    """Begin the run in ``path`` with a copy of the one in ``before``; whole or not at all."""
    if (path / "config.yaml").exists():
        return
    aside = path.with_name(f".{path.name}.part")
    shutil.rmtree(aside, ignore_errors=True)
    left = shutil.ignore_patterns("result.json", "final*", ".lock", "tensorboard")
    shutil.copytree(before, aside, ignore=left)
    for name in sorted(os.listdir(aside), key=lambda name: name == "config.yaml"):
        if (path / name).is_dir():  # of an attempt that was killed
            shutil.rmtree(path / name)
        os.replace(aside / name, path / name)  # config.yaml last: it says that all is there
    aside.rmdir()
