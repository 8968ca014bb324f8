"""Scalars of a training run for TensorBoard; needs `tensorboard`, not TensorFlow."""

from __future__ import annotations

import math
import time

import keras


class TensorBoardLogger(keras.callbacks.Callback):
    """Writes every log of an epoch: ``train/NAME`` and ``validation/NAME``, robust ones included.

    Put it after the callbacks that add to the logs. The step is the number of the epoch, so that a
    resumed run goes on in the same curves.

    Args:
        path: folder of the event files.
        hparams: what the HParams page shows of this run: ``{name: text, number or bool}``, or
            ``None``.
    """

    def __init__(self, path, hparams=None):
        super().__init__()
        self.path, self.hparams = str(path), hparams
        self._writer = None

    def on_epoch_end(self, epoch, logs=None):
        from tensorboard.compat.proto.summary_pb2 import Summary

        values = []
        for name, value in (logs or {}).items():
            group, plain = ("validation", name[4:]) if name.startswith("val_") else ("train", name)
            if math.isfinite(value):
                values.append(Summary.Value(tag=f"{group}/{plain}", simple_value=float(value)))
        self._write(Summary(value=values), epoch + 1)

    def on_train_end(self, logs=None):
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _write(self, summary, step):
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        if self._writer is None:
            self._writer = EventFileWriter(self.path)
            if self.hparams is not None:
                from tensorboard.plugins.hparams.summary_v2 import hparams_pb

                about = hparams_pb(self.hparams)
                self._writer.add_event(Event(wall_time=time.time(), summary=about))
        self._writer.add_event(Event(wall_time=time.time(), step=step, summary=summary))
        self._writer.flush()  # a run that is killed, or looked at, has its curves
