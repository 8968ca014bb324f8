"""The order in which an epoch visits the examples: a pure function of (seed, epoch)."""

from __future__ import annotations

import numpy as np

from keras_emr.errors import UserError


def random_words(n: int, seed: int, stream: int) -> np.ndarray:
    """``n`` random 64-bit words, fixed by (seed, stream).

    Philox is keyed rather than seeded, so that every (seed, stream) is a sequence of its own, and
    its raw words are used because NumPy promises those, unlike ``Generator`` methods, for ever.

    Args:
        n: how many words.
        seed: int in [0, 2**63).
        stream: int in [0, 2**64).

    Returns:
        uint64 array (n,).

    Raises:
        UserError: the seed is not such an integer.
    """
    if not isinstance(seed, int | np.integer) or not 0 <= seed < 2**63:
        raise UserError(f"seed must be a whole number in [0, 2**63). Received: {seed!r}.")
    key = np.array([int(seed), int(stream)], np.uint64)
    return np.random.Philox(key=key).random_raw(n)


def epoch_order(n: int, seed: int, epoch: int) -> np.ndarray:
    """The permutation of ``range(n)`` that epoch ``epoch`` follows.

    It depends on nothing but its arguments, so that a resumed run sees the batches that an
    uninterrupted one would have seen, on every backend.

    Args:
        n: number of examples.
        seed: int in [0, 2**63).
        epoch: int >= 0.

    Returns:
        int64 array (n,).

    Raises:
        UserError: seed or epoch out of range.

    Example:

    >>> epoch_order(5, seed=0, epoch=0).tolist()
    [0, 2, 1, 4, 3]
    """
    if not isinstance(epoch, int | np.integer) or epoch < 0:
        raise UserError(f"epoch must be a whole number >= 0. Received: {epoch!r}.")
    return np.argsort(random_words(n, seed, epoch), kind="stable").astype(np.int64)
