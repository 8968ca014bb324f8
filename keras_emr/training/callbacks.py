"""Keras callbacks of a robust training run."""

from __future__ import annotations

import math
import time

import keras
import numpy as np

from keras_emr import backend


class EpochTracker(keras.callbacks.Callback):
    """Tells the classifier and its data which epoch it is (added by ``RobustClassifier.fit``).

    Schedules, MAIL's burn-in and the order of the examples are functions of the epoch's number,
    so that a resumed run continues as if it had never stopped.
    """

    def __init__(self, data, seed):
        super().__init__()
        self.data = data
        self.seed = seed

    def on_epoch_begin(self, epoch, logs=None):
        self.model.epoch.assign(epoch)
        if self.data is not None:
            self.data.set_epoch(epoch)
        backend.seed_epoch(int(np.random.SeedSequence([self.seed, epoch]).generate_state(1)[0]))


class TrainingDiverged(RuntimeError):
    """The loss is no longer finite; the message names the epoch and the step."""


class StopOnNonFinite(keras.callbacks.Callback):
    """Raise :class:`TrainingDiverged` at the first step whose loss is NaN or infinite.

    Also at the end of an epoch whose validation loss is not finite: its weights must not replace
    the last good checkpoint. Put it before the callback that saves.
    """

    def __init__(self):
        super().__init__()
        self.epoch = 0

    def on_epoch_begin(self, epoch, logs=None):
        self.epoch = epoch

    def on_train_batch_end(self, batch, logs=None):
        self._check("loss", logs, f"step {batch + 1} of epoch {self.epoch + 1}")

    def on_epoch_end(self, epoch, logs=None):
        self._check("val_loss", logs, f"the end of epoch {epoch + 1}")

    @staticmethod
    def _check(name, logs, moment):
        loss = (logs or {}).get(name)
        if loss is not None and not math.isfinite(loss):
            raise TrainingDiverged(
                f"{name} became {loss} at {moment}. Lower the learning rate, epsilon or the "
                "regularizer's weight."
            )


class CatastrophicOverfitting(TrainingDiverged):
    """Validation accuracy under PGD has collapsed; the message names the epoch and both values."""


class OverfittingGuard(keras.callbacks.Callback):
    """Raise :class:`CatastrophicOverfitting` when a single-step defense stops defending.

    After an epoch whose robust accuracy on validation data is more than ``fall`` below the best so
    far. That epoch is not saved: put it before :class:`Recorder`. (Wong et al., ICLR 2020, look at
    PGD-5 on one training batch, and stop at a fall by 0.2.)

    Args:
        fall: largest fall allowed, > 0.
        rows: history so far, of a resumed run.
        monitor: the log that is watched.
    """

    def __init__(self, fall=0.2, rows=(), monitor="val_robust_accuracy"):
        super().__init__()
        self.fall, self.monitor = fall, monitor
        self.best = max((row[monitor] for row in rows), default=0.0)

    def on_epoch_end(self, epoch, logs=None):
        value = logs[self.monitor]
        if value < self.best - self.fall:
            raise CatastrophicOverfitting(
                f"catastrophic overfitting: {self.monitor} fell from {self.best:.3f} to "
                f"{value:.3f} at the end of epoch {epoch + 1}. Use more attack steps, a smaller "
                "step size or a lower learning rate."
            )
        self.best = max(self.best, value)


class StopEarly(keras.callbacks.Callback):
    """End training when the best epoch lies ``patience`` epochs back. Put it after the recorder.

    Args:
        recorder: :class:`Recorder`, which knows the history, a resumed run's included.
        patience: epochs without a better one, >= 1.
    """

    def __init__(self, recorder, patience):
        super().__init__()
        self.recorder, self.patience = recorder, patience

    @property
    def due(self):
        """Whether it is time."""
        rows = self.recorder.rows
        return bool(rows) and len(rows) - self.recorder.best["epoch"] >= self.patience

    def on_epoch_end(self, epoch, logs=None):
        if self.due:
            self.model.stop_training = True


class EffectiveMarginLogger(keras.callbacks.Callback):
    """Adds effective margins on fixed images to each epoch's logs.

    Keys: ``val_effective_margin_l2``, ``val_effective_margin_linf`` (means),
    ``val_share_above_epsilon`` and ``val_effective_weight_norm``. Put it before callbacks that
    read them.

    Args:
        x, y: images (N, H, W, C) in [0, 1] and labels (N,).
        epsilon, norm: the threat model that ``val_share_above_epsilon`` compares with.
        between: called before every batch of images, if given; what it raises ends the epoch.
    """

    def __init__(self, x, y, epsilon, norm="linf", between=None):
        super().__init__()
        self.x, self.y, self.epsilon, self.norm = x, y, epsilon, norm
        self.between = between
        self._measure = None

    def on_epoch_end(self, epoch, logs=None):
        from keras_emr.evaluation.margins import MarginMeter, summarize

        if self._measure is None:
            self._measure = MarginMeter(self.model.model, between=self.between)
        with self.model.averaged():
            measured = self._measure(self.x, self.y)
        summary = summarize(measured, self.epsilon, self.norm)
        for key in (
            "effective_margin_l2",
            "effective_margin_linf",
            "share_above_epsilon",
            "effective_weight_norm",
        ):
            logs[f"val_{key}"] = math.nan if summary[key] is None else summary[key]


class Interrupted(Exception):
    """Training was asked to stop (``signal_number``); raised between two steps.

    ``where``: what the newest checkpoint holds, e.g. ``epoch 3, step 17``, if one was written.
    """

    def __init__(self, signal_number, where=None):
        super().__init__(f"interrupted by signal {signal_number}")
        self.signal_number, self.where = signal_number, where


class StopOnSignal:
    """Set ``requested`` to a signal's number, and training stops after the step under way.

    A signal must not stop a step half-way: on JAX its donated buffers would be lost.
    """

    def __init__(self):
        self.requested = None


class StopAfter(keras.callbacks.Callback):
    """Stop after ``batches`` training batches."""

    def __init__(self, batches):
        super().__init__()
        self.left = batches

    def on_train_batch_end(self, batch, logs=None):
        self.left -= 1
        self.model.stop_training = self.left <= 0


class Recorder(keras.callbacks.Callback):
    """Writes a run folder: each epoch's ``history.jsonl`` line, ``best``, ``last``.

    ``best`` and ``last`` have the averaged weights where there are any. Beside ``best.keras`` the
    learned maximizer of that epoch, if there is one.

    Put it before the callback that writes the checkpoint: whatever moment a run is killed at, the
    files are then at most ahead of the checkpoint, and are written once more with the same content.

    Args:
        folder: :class:`keras_emr.training.run_folder.RunFolder`.
        monitor: the log that ``best.keras`` maximises; the earliest epoch wins a tie.
        rows: history so far, of a resumed run.
    """

    def __init__(self, folder, monitor, rows=()):
        super().__init__()
        self.folder = folder
        self.monitor = monitor
        self.rows = list(rows)
        self._before, self._began = 0.0, None

    @property
    def best(self):
        """History row of the best epoch, or ``None``."""
        return max(self.rows, key=lambda row: row[self.monitor], default=None)

    @property
    def elapsed(self):
        """Seconds that the epoch under way has taken, before an interruption included."""
        now = 0.0 if self._began is None else time.perf_counter() - self._began
        return self._before + now

    @elapsed.setter
    def elapsed(self, seconds):
        self._before, self._began = seconds, None

    def on_epoch_begin(self, epoch, logs=None):
        self._began = time.perf_counter()

    def on_epoch_end(self, epoch, logs=None):
        # JSON has no NaN: a margin that is not defined (no finite one) is null.
        metrics = {k: float(v) if math.isfinite(v) else None for k, v in logs.items()}
        self.rows.append({"epoch": epoch + 1, **metrics, "seconds": round(self.elapsed, 3)})
        self.elapsed = 0.0
        self.folder.write_history(self.rows)
        with self.model.averaged():
            self.folder.save_model(self.model.model, self.folder.last)
            if self.best is self.rows[-1]:
                self.folder.copy(self.folder.last, self.folder.best)
                if self.model.maximizer is not None:
                    self.folder.save_model(self.model.maximizer, self.folder.maximizer)
