"""Run a compiled function over a data set in batches, of one shape where shapes are compiled."""

import numpy as np
from keras import ops

from keras_emr import backend


def padded(array, size):
    """``array`` with its last row repeated up to ``size`` rows: one shape, one compilation.

    Where nothing is compiled (torch) it is ``array`` itself.
    """
    missing = size - len(array) if backend.SHAPES_COMPILED else 0
    return array if missing <= 0 else np.concatenate([array, np.repeat(array[-1:], missing, 0)])


def in_batches(fn, size, *arrays):
    """Apply ``fn`` to equal slices of ``arrays`` and join the results.

    Args:
        fn: takes tensors of ``size`` rows, returns a tuple of tensors with as many rows.
        size: rows at a time; the last batch is :func:`padded`, its padding dropped.
        arrays: NumPy arrays of the same length N.

    Returns:
        Tuple of NumPy arrays with N rows.
    """
    n = len(arrays[0])
    parts = []
    for begin in range(0, n, size):
        batch = [ops.convert_to_tensor(padded(a[begin : begin + size], size)) for a in arrays]
        rows = min(size, n - begin)
        parts.append([ops.convert_to_numpy(out)[:rows] for out in fn(*batch)])
    return tuple(np.concatenate(column) for column in zip(*parts, strict=True))
