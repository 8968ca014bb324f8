"""Divide a data set in two, class by class, as a pure function of the labels and a seed."""

from __future__ import annotations

import numbers

import numpy as np

from keras_emr.data.order import random_words
from keras_emr.errors import UserError

# Epochs use the streams 0, 1, 2, ...; the split draws from one that no epoch reaches.
_SPLIT_STREAM = 2**63


def stratified_split(y: np.ndarray, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Choose a fraction of the examples at random, in the same proportion from every class.

    The number taken is ``round(fraction * N)``. Each class gives its share rounded down, and what
    is then missing comes from the classes that lost most by rounding (largest remainder). A class
    never gives its last example, so that every class stays among the kept ones; only where that
    rule binds are fewer taken.

    Args:
        y: integer labels (N,).
        fraction: share to take, in (0, 1).
        seed: int in [0, 2**63); the same seed gives the same split on every platform.

    Returns:
        ``(kept, taken)``: sorted int64 index arrays, disjoint, together ``range(N)``.

    Raises:
        UserError: fraction or seed out of range.
    """
    check_fraction("fraction", fraction)
    y = np.asarray(y)
    _, classes, counts = np.unique(y, return_inverse=True, return_counts=True)
    take = _shares(counts, fraction, round(fraction * len(y)))

    # Shuffle within each class: sort by class, and by random words inside a class.
    shuffled = np.lexsort((random_words(len(y), seed, _SPLIT_STREAM), classes))
    first = np.cumsum(counts) - counts
    rank = np.arange(len(y)) - np.repeat(first, counts)
    chosen = rank < np.repeat(take, counts)
    return np.sort(shuffled[~chosen]), np.sort(shuffled[chosen])


def check_fraction(field: str, value: float, below: float = 1) -> None:
    """Raise :class:`UserError` unless ``0 < value < below``."""
    if not isinstance(value, numbers.Real) or not 0 < value < below:
        raise UserError(f"{field} must be a number in (0, {below}). Received: {value!r}.")


def _shares(counts: np.ndarray, fraction: float, total: int) -> np.ndarray:
    """How many to take from each class: ``total`` in all, or as many as the classes can give."""
    most = counts - 1
    take = np.minimum(np.floor(fraction * counts).astype(np.int64), most)
    by_remainder = np.argsort(-(fraction * counts - take), kind="stable")
    while (missing := total - take.sum()) > 0 and (able := take < most).any():
        take[by_remainder[able[by_remainder]][:missing]] += 1
    return take
