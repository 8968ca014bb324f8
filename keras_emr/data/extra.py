"""Extra training data, such as generated images, mixed into every batch at a fixed share."""

from __future__ import annotations

import functools
import math
import os
from pathlib import Path

import numpy as np

from keras_emr.data.checks import check_images, check_labels, to_unit_float
from keras_emr.data.dataset import fingerprint
from keras_emr.data.npz import read_arrays
from keras_emr.data.order import random_words
from keras_emr.errors import UserError

# Pass p over the extra data draws from stream EXTRA_STREAM + p: between split and augmentation.
EXTRA_STREAM = 2**63 + 2**61
_NAMES = (("x_train", "y_train"), ("x", "y"), ("image", "label"))


class ExtraData:
    """Images and labels of which every batch holds the same number, and what comes next when.

    All are used once before any is used again; the order is a function of (seed, pass). An epoch
    is still one pass over the data set's own images.

    Args:
        x: images (M, H, W, C), uint8 or float32 in [0, 1]; uint8 stays so until it is used.
        y: labels (M,).
        ratio: the share of a batch that they make up, in (0, 1): of 0.3, three in ten. (Papers
            that call 0.3 the "original-to-generated ratio" mean 0.7 here.)
    """

    def __init__(self, x: np.ndarray, y: np.ndarray, ratio: float):
        self.x, self.y, self.ratio = x, y, ratio

    def share_of(self, batch_size: int) -> int:
        """How many of a batch they are: ``round(ratio * batch_size)``.

        Raises:
            UserError: none, or all.
        """
        share = math.floor(self.ratio * batch_size + 0.5)
        if not 0 < share < batch_size:
            raise UserError(
                f"extra_ratio: leaves a batch of one kind only. Received: {self.ratio} of"
                f" batch_size {batch_size}, which is {share}. Expected at least one extra and one"
                " other image in a batch."
            )
        return share

    def take(self, count: int, step: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """``(x, y, places)`` of batch number ``step`` of the whole run, ``count`` examples."""
        places = np.arange(step * count, (step + 1) * count)
        passes, places = places // len(self.x), places % len(self.x)
        chosen = np.empty(count, np.int64)
        for number in np.unique(passes):
            now = passes == number
            chosen[now] = _order(len(self.x), seed, int(number))[places[now]]
        return to_unit_float(self.x[chosen]), self.y[chosen], chosen

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of the images and labels."""
        return fingerprint({"x": self.x, "y": self.y})


# Kept: sorting a million words for every batch would cost more than reading it.
@functools.lru_cache(maxsize=2)
def _order(n: int, seed: int, number: int) -> np.ndarray:
    """The order of pass ``number`` over ``n`` examples."""
    return np.argsort(random_words(n, seed, EXTRA_STREAM + number), kind="stable")


def load_extra(
    path: str | os.PathLike, ratio: float, image_shape: tuple[int, ...], classes: int
) -> ExtraData:
    """Extra data from an ``.npz`` file.

    Args:
        path: holds ``x_train, y_train``, or ``x, y``, or ``image, label``.
        ratio: see :class:`ExtraData`.
        image_shape: (H, W, C) of the data set.
        classes: its number of classes.

    Raises:
        UserError: unreadable, no such arrays, other images, or labels that the data set lacks.
    """
    arrays = read_arrays(Path(path), _NAMES)
    (x_name, x), (y_name, y) = arrays.items()
    x = check_images(f"extra {x_name}", x)
    if x.shape[1:] != tuple(image_shape):
        raise UserError(
            f"extra {x_name}: images must have the shape of the training images. Received:"
            f" {x.shape[1:]} in {str(path)!r}. Expected {tuple(image_shape)}."
        )
    y = check_labels(f"extra {y_name}", y, len(x), classes, "the data set")
    return ExtraData(x if x.dtype == np.uint8 else to_unit_float(x), y, ratio)
