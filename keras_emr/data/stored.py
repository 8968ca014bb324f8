"""Images that stay where they are stored until a batch asks for them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from keras_emr.data.checks import to_unit_float
from keras_emr.errors import unknown

# Of float32 images in memory; what is larger is read batch by batch.
MEMORY_BOUND = 2 << 30
STREAM = ("auto", "always", "never")

Read = Callable[[np.ndarray], np.ndarray]


def fits_memory(count: int, shape: tuple[int, ...], stream: str = "auto") -> bool:
    """Whether ``count`` images (H, W, C) are to be held in memory.

    Args:
        stream: ``always`` and ``never`` decide by themselves; ``auto`` holds up to
            ``MEMORY_BOUND`` bytes of float32.

    Raises:
        UserError: another word.
    """
    if stream not in STREAM:
        raise unknown("stream", stream, STREAM)
    size = 4 * count * int(np.prod(shape, dtype=np.int64))
    return stream == "never" or (stream == "auto" and size <= MEMORY_BOUND)


class StoredImages:
    """Images (N, H, W, C), float32 in [0, 1], that are read when they are indexed.

    It has what a batch needs of an array: ``len``, ``shape``, ``dtype`` and indexing with a whole
    number, a slice or an array of them. ``numpy.asarray`` reads everything.

    Args:
        read: from int64 indices (n,) to uint8 images (n, H, W, C); called from several threads.
        index: which images, int64 (N,).
        image_shape: (H, W, C).
        extremes: smallest and largest pixel of every stored image: two uint8 arrays.
    """

    dtype = np.dtype(np.float32)
    ndim = 4

    def __init__(
        self,
        read: Read,
        index: np.ndarray,
        image_shape: tuple[int, int, int],
        extremes: tuple[np.ndarray, np.ndarray],
    ):
        self._read, self._index, self._extremes = read, index, extremes
        self.shape = (len(index), *image_shape)

    def __len__(self) -> int:
        return len(self._index)

    def __getitem__(self, key) -> np.ndarray:
        """float32 image (H, W, C) for a number, else images (n, H, W, C)."""
        chosen = self._index[key]
        images = to_unit_float(self._read(np.atleast_1d(chosen)))
        return images if np.ndim(chosen) else images[0]

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        return self[:].astype(dtype or self.dtype, copy=False)

    def min(self) -> np.float32:
        """The smallest pixel, without reading the images again."""
        return to_unit_float(self._extremes[0][self._index].min(keepdims=True))[0]

    def max(self) -> np.float32:
        """The largest pixel, without reading the images again."""
        return to_unit_float(self._extremes[1][self._index].max(keepdims=True))[0]
