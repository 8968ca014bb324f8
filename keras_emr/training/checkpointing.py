"""The callback that writes checkpoints, and stops a run that was asked to stop."""

from __future__ import annotations

import time

import keras
import numpy as np

from keras_emr import distribution
from keras_emr.training import snapshot
from keras_emr.training.callbacks import Interrupted
from keras_emr.training.checkpoints import Position


class Checkpointer(keras.callbacks.Callback):
    """Saves at each epoch's end, every so often inside it, and when asked to stop. Put it last.

    Args:
        checkpoints: :class:`keras_emr.training.checkpoints.Checkpoints`.
        identity: see :func:`keras_emr.training.snapshot.identity`.
        recorder: :class:`keras_emr.training.callbacks.Recorder`: history, seconds.
        steps: of an epoch.
        every: :class:`keras_emr.training.intervals.Every`.
        stop: :class:`keras_emr.training.callbacks.StopOnSignal`, or ``None``.
        others: callbacks; those with ``get_state`` and ``set_state`` are kept too.
    """

    def __init__(self, checkpoints, identity, recorder, steps, every, stop=None, others=()):
        super().__init__()
        self.checkpoints, self.identity, self.recorder = checkpoints, identity, recorder
        self.steps, self.every, self.stop = steps, every, stop
        self.others = [c for c in others if hasattr(c, "get_state") and hasattr(c, "set_state")]
        self.warming_up = False
        self._epoch = 0
        self._done = 0  # steps of this epoch
        self._last = None  # (logs, what validation changes) after an epoch's last step
        self._saved_at = (time.monotonic(), None)
        self._since = 0  # steps since then

    @property
    def _position(self):
        if self.warming_up:
            return Position(-1, self._epoch * self.steps + self._done)
        return Position(self._epoch, self._done)

    def resume(self, found):
        """Take up what a checkpoint says of the callbacks."""
        self.recorder.elapsed = found.state["elapsed"]
        self._saved_at = (time.monotonic(), found.position)
        for callback, (name, state) in zip(self.others, found.state["callbacks"], strict=False):
            if name == type(callback).__name__:
                callback.set_state(state)

    def undo_finalization(self):
        """Keras's own averaging optimizers put their average in place whenever ``fit`` ends.

        An uninterrupted training has the average in place at its very end only.
        """
        optimizer = getattr(self.model.optimizer, "inner_optimizer", self.model.optimizer)
        if optimizer.use_ema:
            snapshot.restore(self.model, self.checkpoints.newest(self.identity).arrays)

    def save(self, position):
        """Write a checkpoint, unless weights have stopped being numbers."""
        arrays, logs = snapshot.capture(self.model), None
        if self._last is not None and position.step == self.steps:
            logs, passing = self._last
            arrays |= passing
        if position.step == 0:  # an epoch's begin sets the backend's hidden random state anyway
            arrays = snapshot.without_random(arrays)
        if not _finite(arrays, snapshot.trainable_names(self.model)):
            return
        state = {
            "identity": self.identity,
            "history": self.recorder.rows,
            "elapsed": self.recorder.elapsed,
            "logs": logs,
            "callbacks": [(type(c).__name__, c.get_state()) for c in self.others],
        }
        self.checkpoints.save(position, arrays, state)
        self._saved_at, self._since = (time.monotonic(), position), 0

    def check(self):
        """Between two steps, or two batches of validation: save or stop if it is time."""
        requested = (self.stop.requested if self.stop else None) or 0
        moment, position = self._saved_at
        over = self.every.over(time.monotonic() - moment, self._since)
        # One of several processes that stopped, or saved, alone would leave the others waiting.
        due = distribution.agree(2 * requested + over)
        if position != self._position and due:
            self.save(self._position)
        if requested := due // 2:
            raise Interrupted(requested, str(self._saved_at[1] or self._position))

    def on_epoch_begin(self, epoch, logs=None):
        self._epoch, self._done, self._last = epoch, 0, None

    def on_train_batch_end(self, batch, logs=None):
        self._since += batch + 1 - self._done
        self._done = batch + 1
        if self._done == self.steps and not self.warming_up:
            logs = {name: float(value) for name, value in (logs or {}).items()}
            self.ended(logs, snapshot.capture_passing(self.model))
        self.check()

    def ended(self, logs, passing):
        """The epoch's last step has been taken: what its validation is going to change."""
        self._done, self._last = self.steps, (logs, passing)

    def on_test_batch_end(self, batch, logs=None):
        self.check()

    def on_epoch_end(self, epoch, logs=None):
        if not self.warming_up:
            self._epoch, self._done, self._last = epoch + 1, 0, None
            self.save(self._position)
            self.check()


def _finite(arrays, names):
    return all(np.isfinite(arrays[name]).all() for name in names if arrays[name].dtype.kind == "f")
