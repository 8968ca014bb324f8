"""Small networks and data shared by the tests."""

import json
from pathlib import Path

import keras
import numpy as np
from keras import layers


def images(n=48, side=6, classes=3, seed=0):
    """Random images in [0, 1] (n, side, side, 1) and labels that depend on them."""
    rng = np.random.default_rng(seed)
    y = rng.integers(0, classes, n)
    x = 0.3 * rng.uniform(size=(n, side, side, 1)) + 0.7 * (y / (classes - 1))[:, None, None, None]
    return x.astype("float32"), y.astype("int32")


def network(side=6, classes=3, batch_norm=True, dropout=0.0, seed=0):
    """conv - [BatchNorm] - relu - [dropout] - dense: logits."""
    keras.utils.set_random_seed(seed)
    stack = [keras.Input((side, side, 1)), layers.Conv2D(4, 3)]
    stack += [layers.BatchNormalization()] if batch_norm else []
    stack += [layers.Activation("relu"), layers.Flatten()]
    stack += [layers.Dropout(dropout, seed=5)] if dropout else []
    return keras.Sequential([*stack, layers.Dense(classes)])


def snapshot(variables):
    """Copies of the variables' values."""
    return [np.array(keras.ops.convert_to_numpy(v.value)) for v in variables]


def assert_same(before, after):
    """Bit-identical, and there was something to compare."""
    assert len(before) == len(after) > 0
    for a, b in zip(before, after, strict=True):
        np.testing.assert_array_equal(a, b)


def newest_checkpoint(run):
    """``(state, arrays)`` of a run's newest checkpoint, read without the library."""
    path = max((Path(run) / "checkpoints").glob("epoch-*"))
    with np.load(path / "arrays.npz") as arrays:
        return json.loads((path / "state.json").read_text()), dict(arrays)


def assert_same_arrays(one, other):
    """Bit-identical under the same names."""
    assert set(one) == set(other) and one
    for name in one:
        assert one[name].dtype == other[name].dtype, name
        np.testing.assert_array_equal(one[name], other[name], err_msg=name)
