"""Training batches: one shape for ever, so that nothing is compiled twice."""

from __future__ import annotations

import functools

import keras
import numpy as np

from keras_emr.data.augment import AUGMENT_STREAM, augmentation
from keras_emr.data.extra import ExtraData
from keras_emr.data.mixing import Mixing
from keras_emr.data.order import epoch_order, random_words
from keras_emr.data.read_ahead import ReadAhead
from keras_emr.data.stored import StoredImages
from keras_emr.errors import UserError
from keras_emr.part import whole

# Batches that are begun while one is trained on, where images are on disk.
_AHEAD = 2


class TrainBatches(keras.utils.PyDataset):
    """Shuffled full batches; the order is :func:`epoch_order`, nothing else.

    Every batch is a function of (seed, epoch, index), whether the images are in memory or read
    from disk, by one thread or several, on every backend.

    The ragged remainder of an epoch is dropped. Each epoch has another order, so over time all
    examples are seen. With fewer examples than one batch, the only batch holds them all.

    Pass it to ``fit`` with ``shuffle=False``: Keras's default would shuffle the batches once more,
    from Python's unseeded ``random``. Call :meth:`set_epoch` in ``Callback.on_epoch_begin``: Keras
    does not say which epoch it is in, and calls ``PyDataset.on_epoch_end`` once before the first,
    so counting there would be wrong, and would not survive a resume.

    Args:
        x: images (N, H, W, C), an array or :class:`keras_emr.data.stored.StoredImages`.
        y: labels (N,).
        batch_size: int >= 1.
        seed: int in [0, 2**63).
        augment: name of an augmentation, see :mod:`keras_emr.data.augment`, or ``"none"``.
        extra: :class:`keras_emr.data.extra.ExtraData`, which takes the places at a batch's end.
        mixing: :class:`keras_emr.data.mixing.Mixing`: labels are then shares of the classes (N, K).
        replays: how many times in a row each batch comes, see ``FreeAdversarialTraining``.
        numbered: give ``{"label": y, "number": i}`` in place of ``y``, ``i`` the examples' places
            in ``x``, extra data counted on from there; see ``MMA``.
        share: ``(i, n)``: only the i-th of n equal parts of every batch, for process i of n.

    Raises:
        UserError: no examples, lengths that differ, a bad batch size or seed, an unknown
            augmentation, or extra data that do not fit.
    """

    def __init__(
        self,
        x: np.ndarray | StoredImages,
        y: np.ndarray,
        batch_size: int,
        seed: int = 0,
        augment: str = "none",
        extra: ExtraData | None = None,
        mixing: Mixing | None = None,
        replays: int = 1,
        numbered: bool = False,
        share: tuple[int, int] = (0, 1),
    ):
        # One worker: Keras's queue would run ahead of the epoch's order. See ReadAhead.
        super().__init__(workers=1)
        batch_size = _check(x, y, batch_size)
        self._extra = extra
        self._others = extra.share_of(batch_size) if extra else 0
        self._own = min(batch_size - self._others, len(x))
        self.batch_size = self._own + self._others
        self._rows = share_of(self.batch_size, share)
        self.x, self.y, self.seed = x, y, seed
        self._augment = augmentation(augment)
        self._mixing, self._numbered = mixing, numbered
        self._kept = None, None  # the batch that comes again
        self.replays = whole("replays", replays, 1)
        # Slicing an array is cheap; threads would only add overhead.
        self._ahead = ReadAhead() if isinstance(x, StoredImages) else None
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Take the order of epoch ``epoch`` (from 0)."""
        self.epoch = epoch
        self._order = epoch_order(len(self.x), self.seed, epoch)

    @property
    def mixes(self) -> bool:
        """Whether labels are shares of the classes."""
        return self._mixing is not None

    @property
    def _batches(self) -> int:
        """Different batches of an epoch."""
        return len(self.x) // self._own

    def __len__(self) -> int:
        return self._batches * self.replays

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """``(x, y)`` of batch ``index``."""
        if not 0 <= index < len(self):
            raise IndexError(f"batch {index} of {len(self)}")
        index //= self.replays
        if self.replays == 1:
            return self._batch(index)
        if self._kept[0] != (self.epoch, index):
            self._kept = (self.epoch, index), self._batch(index)
        return self._kept[1]

    def _batch(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        # One look at the epoch, which must not change between the parts of a batch.
        epoch, make = self.epoch, functools.partial(self._make, self._order)
        if self._ahead is None:
            return make((epoch, index))
        following = range(index, min(index + 1 + _AHEAD, self._batches))
        return self._ahead.get([(epoch, i) for i in following], make)

    def _make(self, order: np.ndarray, key: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
        epoch, index = key
        # What is mixed needs its partners from the whole batch.
        rows = self._rows if self._mixing is None else slice(0, self.batch_size)
        chosen = order[index * self._own : (index + 1) * self._own][rows]
        x, y = self.x[chosen], self.y[chosen]
        step = epoch * self._batches + index
        if self._extra is not None:
            more_x, more_y, places = self._extra.take(self._others, step, self.seed)
            part = slice(max(rows.start - self._own, 0), max(rows.stop - self._own, 0))
            x, y = np.concatenate([x, more_x[part]]), np.concatenate([y, more_y[part]])
            chosen = np.concatenate([chosen, len(self.x) + places[part]])
        if self._augment is not None:
            words = random_words(self.batch_size, self.seed, AUGMENT_STREAM + step)
            x = self._augment(x, words[rows])
        if self._mixing is not None:
            x, y = (part[self._rows] for part in self._mixing(x, y, self.seed, step))
        return x, {"label": y, "number": chosen.astype(np.int32)} if self._numbered else y


class RestOfEpoch(keras.utils.PyDataset):
    """The batches of an epoch from ``first`` on, for a training that goes on inside it.

    Args:
        batches: :class:`TrainBatches`.
        first: index of the first batch, below their number.
    """

    def __init__(self, batches: TrainBatches, first: int):
        super().__init__(workers=1)
        self.batches, self.first = batches, first

    def set_epoch(self, epoch: int) -> None:
        """Take the order of epoch ``epoch`` (from 0)."""
        self.batches.set_epoch(epoch)

    def __len__(self) -> int:
        return len(self.batches) - self.first

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """``(x, y)`` of batch ``first + index`` of the epoch."""
        if not 0 <= index < len(self):
            raise IndexError(f"batch {index} of {len(self)}")
        return self.batches[self.first + index]


class EvalBatches(keras.utils.PyDataset):
    """All images in their order, read batch by batch: for validation images on disk.

    Args:
        x: images (N, H, W, C), indexable.
        y: labels (N,).
        batch_size: int >= 1; the last batch may be smaller.

    Raises:
        UserError: as :class:`TrainBatches`.
    """

    def __init__(self, x: StoredImages, y: np.ndarray, batch_size: int):
        super().__init__(workers=1)
        self.x, self.y, self.batch_size = x, y, _check(x, y, batch_size)

    def __len__(self) -> int:
        return -(-len(self.x) // self.batch_size)

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """``(x, y)`` of batch ``index``."""
        if not 0 <= index < len(self):
            raise IndexError(f"batch {index} of {len(self)}")
        chosen = slice(index * self.batch_size, (index + 1) * self.batch_size)
        return self.x[chosen], self.y[chosen]


class EvenBatches(keras.utils.PyDataset):
    """All images in their order, in batches of exactly one size, with weights.

    What is missing in the last batch are copies of the last image, of weight zero. The others have
    the weight ``places / images``: with Keras's reduction (sum of weighted losses over the places)
    every mean over an epoch is the mean over the images.

    Args:
        x, y, batch_size: as :class:`EvalBatches`.
        share: as of :class:`TrainBatches`.
    """

    def __init__(self, x, y, batch_size: int, share: tuple[int, int] = (0, 1)):
        super().__init__(workers=1)
        self.x, self.y, self.batch_size = x, y, _check(x, y, batch_size)
        self._rows = share_of(batch_size, share)

    def __len__(self) -> int:
        return -(-len(self.x) // self.batch_size)

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """``(x, y, weights)`` of batch ``index``."""
        if not 0 <= index < len(self):
            raise IndexError(f"batch {index} of {len(self)}")
        places = np.arange(self.batch_size)[self._rows] + index * self.batch_size
        chosen = np.minimum(places, len(self.x) - 1)
        weights = (places < len(self.x)) * (len(self) * self.batch_size / len(self.x))
        return self.x[chosen], self.y[chosen], weights.astype("float32")


def share_of(batch_size: int, share: tuple[int, int]) -> slice:
    """The rows of a batch that process ``share[0]`` of ``share[1]`` feeds."""
    index, count = share
    return slice(batch_size * index // count, batch_size * (index + 1) // count)


def _check(x: np.ndarray, y: np.ndarray, batch_size: int) -> int:
    if not isinstance(batch_size, int | np.integer) or batch_size < 1:
        raise UserError(f"batch_size must be a whole number >= 1. Received: {batch_size!r}.")
    if len(x) == 0 or len(x) != len(y):
        raise UserError(
            f"batches: one label for each image is needed, and at least one image."
            f" Received: {len(x)} images and {len(y)} labels."
        )
    return int(batch_size)
