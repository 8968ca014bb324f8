"""Training batches: one shape for ever, so that nothing is compiled twice."""

from __future__ import annotations

import keras
import numpy as np

from keras_emr.data.order import epoch_order
from keras_emr.errors import UserError


class TrainBatches(keras.utils.PyDataset):
    """Shuffled full batches; the order is :func:`epoch_order`, nothing else.

    The ragged remainder of an epoch is dropped. Each epoch has another order, so over time all
    examples are seen. With fewer examples than one batch, the only batch holds them all.

    Pass it to ``fit`` with ``shuffle=False``: Keras's default would shuffle the batches once more,
    from Python's unseeded ``random``. Call :meth:`set_epoch` in ``Callback.on_epoch_begin``: Keras
    does not say which epoch it is in, and calls ``PyDataset.on_epoch_end`` once before the first,
    so counting there would be wrong, and would not survive a resume.

    Args:
        x: images (N, H, W, C).
        y: labels (N,).
        batch_size: int >= 1.
        seed: int in [0, 2**63).

    Raises:
        UserError: no examples, lengths that differ, or a bad batch size or seed.
    """

    def __init__(self, x: np.ndarray, y: np.ndarray, batch_size: int, seed: int = 0):
        super().__init__(workers=1)  # slicing is cheap; threads would only add overhead
        self.batch_size = min(_check(x, y, batch_size), len(x))
        self.x, self.y, self.seed = x, y, seed
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Take the order of epoch ``epoch`` (from 0)."""
        self.epoch = epoch
        self._order = epoch_order(len(self.x), self.seed, epoch)

    def __len__(self) -> int:
        return len(self.x) // self.batch_size

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """``(x, y)`` of batch ``index``."""
        start = _start(self, index)
        chosen = self._order[start : start + self.batch_size]
        return self.x[chosen], self.y[chosen]


def _check(x: np.ndarray, y: np.ndarray, batch_size: int) -> int:
    if not isinstance(batch_size, int | np.integer) or batch_size < 1:
        raise UserError(f"batch_size must be a whole number >= 1. Received: {batch_size!r}.")
    if len(x) == 0 or len(x) != len(y):
        raise UserError(
            f"batches: one label for each image is needed, and at least one image."
            f" Received: {len(x)} images and {len(y)} labels."
        )
    return int(batch_size)


def _start(batches: TrainBatches, index: int) -> int:
    if not 0 <= index < len(batches):
        raise IndexError(f"batch {index} of {len(batches)}")
    return index * batches.batch_size
