"""Random changes of training images, each a function of the random words that it is given."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from keras_emr.errors import unknown

# Step s of a run draws from stream AUGMENT_STREAM + s: beyond the streams of epochs and split.
AUGMENT_STREAM = 2**63 + 2**62
# A side's share that is padded, and the most pixels: 4 at CIFAR's 32, 1 at the digits' 8.
_PADDED_SHARE, _PADDING = 8, 4

Augmentation = Callable[[np.ndarray, np.ndarray], np.ndarray]


def cifar(x: np.ndarray, words: np.ndarray) -> np.ndarray:
    """Pad by 4 zeros on every side, crop a window of the old size, flip left-right half the time.

    The augmentation of the published CIFAR settings (He et al., CVPR 2016; TRADES, MART, EMR).
    Images below 32 pixels are padded by an eighth of their shorter side, rounded up: by 4 pixels,
    half of an 8x8 digit would leave the window and nothing could be learned from the rest.

    Args:
        x: images (N, H, W, C).
        words: uint64 (N,), one random word for each image.

    Returns:
        Images of the same shape and dtype.
    """
    _, height, width, _ = x.shape
    pad = padding(min(height, width))
    padded = np.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    places = 2 * pad + 1
    down, right, flip = (_below(k, words, place) for place, k in enumerate((places, places, 2)))
    columns = np.where(flip[:, None] == 1, np.arange(width)[::-1], np.arange(width))
    rows = down[:, None] + np.arange(height)
    columns = right[:, None] + columns
    return padded[np.arange(len(x))[:, None, None], rows[:, :, None], columns[:, None, :]]


def padding(side: int) -> int:
    """Zeros on every side of an image whose shorter side has ``side`` pixels."""
    return min(-(-side // _PADDED_SHARE), _PADDING)


AUGMENTATIONS = {"none": None, "cifar": cifar}


def augmentation(name: str) -> Augmentation | None:
    """The augmentation of that name; ``None`` for ``"none"``.

    Raises:
        UserError: an unknown name.
    """
    if name not in AUGMENTATIONS:
        raise unknown("augment", name, AUGMENTATIONS)
    return AUGMENTATIONS[name]


def _below(k: int, words: np.ndarray, place: int) -> np.ndarray:
    """Whole numbers in [0, k) from 21 bits of each word; the bias is below k / 2**21."""
    bits = (words >> np.uint64(21 * place)) & np.uint64(2**21 - 1)
    return ((bits * np.uint64(k)) >> np.uint64(21)).astype(np.int64)
