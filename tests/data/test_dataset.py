"""Checks of the arrays a user brings, and what a data set is made of."""

import hashlib
import os
import subprocess
import sys

import numpy as np
import pytest

from keras_emr.data.checks import MAX_CLASSES, to_unit_float
from keras_emr.data.dataset import fingerprint, from_arrays
from keras_emr.errors import UserError, unknown


def arrays(**changes):
    """A good data set of 30 + 6 + 9 images 4x5x1 with three classes; None removes an array."""
    rng = np.random.default_rng(0)
    good = {}
    for part, n in (("train", 30), ("val", 6), ("test", 9)):
        good[f"x_{part}"] = rng.random((n, 4, 5, 1), np.float32)
        good[f"y_{part}"] = np.arange(n) % 3
    return {key: value for key, value in {**good, **changes}.items() if value is not None}


def changed(shape, value, dtype=np.float32):
    """Images of 0.5 whose first value is another."""
    x = np.full(shape, 0.5, dtype)
    x.flat[0] = value
    return x


def test_a_good_data_set():
    given = arrays()
    data = from_arrays(given, name="mine")
    assert data.name == "mine"
    assert (data.image_shape, data.classes, data.class_names) == ((4, 5, 1), 3, ("0", "1", "2"))
    for part in ("train", "val", "test"):
        assert getattr(data, f"x_{part}") is given[f"x_{part}"]  # float32 is not copied
        y = getattr(data, f"y_{part}")
        assert y.dtype == np.int32
        np.testing.assert_array_equal(y, given[f"y_{part}"])
    assert repr(data) == "Dataset('mine': 30 train, 6 val, 9 test; (4, 5, 1), 3 classes)"
    with pytest.raises(AttributeError):
        data.classes = 4


def test_uint8_is_divided_by_255_exactly():
    x = np.arange(256, dtype=np.uint8).reshape(4, 8, 8, 1)
    scaled = to_unit_float(x)
    assert scaled.dtype == np.float32
    # The nearest float32 to k / 255, which is what dividing in float64 and rounding gives.
    np.testing.assert_array_equal(scaled.ravel(), (np.arange(256) / 255).astype(np.float32))
    assert (scaled.min(), scaled.max()) == (0.0, 1.0)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, ">f4", ">f8"])
def test_float_images_become_native_float32(dtype):
    x = np.linspace(0, 1, 30 * 20).reshape(30, 4, 5).astype(dtype)
    data = from_arrays(arrays(x_train=x))
    assert data.x_train.shape == (30, 4, 5, 1)
    assert data.x_train.dtype == np.dtype(np.float32) and data.x_train.dtype.isnative
    np.testing.assert_array_equal(data.x_train[..., 0], x.astype(np.float32))


def test_grey_images_get_a_channel_axis_in_every_part():
    given = {k: v[..., 0] if k[0] == "x" else v for k, v in arrays().items()}
    data = from_arrays(given)
    assert [len(data.x_train), len(data.x_val), len(data.x_test)] == [30, 6, 9]
    assert data.x_test.shape == (9, 4, 5, 1)


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.int16, np.int64, np.uint64])
def test_any_integer_labels(dtype):
    y = (np.arange(30) % 3).astype(dtype)
    np.testing.assert_array_equal(from_arrays(arrays(y_train=y)).y_train, np.arange(30) % 3)


def test_a_missing_class_still_counts():
    y = np.array([0, 4] * 15)
    assert from_arrays(arrays(y_train=y)).classes == 5


X = (30, 4, 5, 1)
BAD = {
    "negative": (
        {"x_train": changed(X, -1)},
        "x_train: images must lie in [0, 1]. Received: min=-1, max=0.5. Rescale to [0, 1] first;"
        " normalisation belongs inside the model.",
    ),
    "bytes as float": (
        {"x_val": changed((6, 4, 5, 1), 255)},
        "x_val: images must lie in [0, 1]. Received: min=0.5, max=255. Divide by 255 first, or"
        " store uint8.",
    ),
    "just above one": (
        {"x_test": changed((9, 4, 5, 1), 1.0000001)},
        "x_test: images must lie in [0, 1]. Received: min=0.5, max=1.0000001. Rescale to [0, 1]"
        " first; normalisation belongs inside the model.",
    ),
    "nan": (
        {"x_train": changed(X, np.nan)},
        "x_train: images must be finite. Received: 1 NaN and 0 Inf values. Repair or remove those"
        " images.",
    ),
    "inf": (
        {"x_test": np.full((9, 4, 5, 1), -np.inf, np.float16)},
        "x_test: images must be finite. Received: 0 NaN and 180 Inf values. Repair or remove those"
        " images.",
    ),
    "int images": (
        {"x_train": np.zeros(X, np.int64)},
        "x_train: images must be uint8 in [0, 255] or float in [0, 1]. Received: dtype int64."
        " Convert them with astype, e.g. x.astype('uint8').",
    ),
    "bool images": (
        {"x_train": np.zeros(X, bool)},
        "x_train: images must be uint8 in [0, 255] or float in [0, 1]. Received: dtype bool."
        " Convert them with astype, e.g. x.astype('uint8').",
    ),
    "object images": (
        {"x_train": np.zeros(X, object)},
        "x_train: a plain numeric array is needed. Received: dtype object. Ragged lists give this:"
        " make all images the same size and stack them.",
    ),
    "flat images": (
        {"x_train": np.zeros((30, 20), np.float32)},
        "x_train: images must be (N, H, W, C) or (N, H, W). Received: shape (30, 20). Reshape"
        " them.",
    ),
    "no images": (
        {"x_train": np.zeros((0, 4, 5, 1)), "y_train": np.zeros(0, int)},
        "x_train: no images. Received: shape (0, 4, 5, 1). At least one image is needed.",
    ),
    "other shape": (
        {"x_test": np.zeros((9, 5, 4, 1))},
        "x_test: images must have the shape of those in x_train. Received: (5, 4, 1), x_train has"
        " (4, 5, 1). Resize or convert them.",
    ),
    "other channels": (
        {"x_val": np.zeros((6, 4, 5, 3))},
        "x_val: images must have the shape of those in x_train. Received: (4, 5, 3), x_train has"
        " (4, 5, 1). Resize or convert them.",
    ),
    "float labels": (
        {"y_train": np.arange(30) % 3 * 1.0},
        "y_train: labels must be integers. Received: dtype float64. Number the classes from 0 and"
        " store an integer dtype.",
    ),
    "string labels": (
        {"y_val": np.array(["cat"] * 6)},
        "y_val: labels must be integers. Received: dtype <U3. Number the classes from 0 and store"
        " an integer dtype.",
    ),
    "object labels": (
        {"y_test": np.zeros(9, object)},
        "y_test: a plain numeric array is needed. Received: dtype object. Ragged lists give this:"
        " make all images the same size and stack them.",
    ),
    "column labels": (
        {"y_train": np.zeros((30, 1), int)},
        "y_train: labels must be one-dimensional. Received: shape (30, 1). Flatten a column with"
        " y.reshape(-1), turn one-hot rows into labels with y.argmax(1).",
    ),
    "too few labels": (
        {"y_test": np.arange(8) % 3},
        "y_test: one label for each image is needed. Received: 8 labels for 9 images. Make the"
        " lengths equal.",
    ),
    "negative label": (
        {"y_train": np.arange(30) % 3 - 1},
        "y_train: labels must not be negative. Received: label -1. Number the classes from 0.",
    ),
    "label not in training": (
        {"y_test": np.array([0, 1, 2, 7, 0, 1, 2, 0, 1])},
        "y_test: labels must be below the number of classes. Received: label 7, with K=3 classes"
        " in y_train. Number the classes from 0, the same way in every array.",
    ),
    "label is an identifier": (
        {"y_train": np.arange(30) + 10**12},
        "y_train: labels must be below the number of classes. Received: label 1000000000029, with"
        f" at most {MAX_CLASSES} classes. Number the classes from 0, the same way in every array.",
    ),
    "one class": (
        {"y_train": np.zeros(30, int), "y_val": np.zeros(6, int), "y_test": np.zeros(9, int)},
        "y_train: at least two classes are needed. Received: only label 0. Check that the labels"
        " were read from the right column.",
    ),
    "missing": (
        {"y_val": None, "x_test": None},
        "data arrays are missing: y_val, x_test. Received: x_train, y_train, x_val, y_test."
        " Expected x_train, y_train, x_test, y_test, and x_val with y_val or neither.",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arrays_are_refused_in_one_line(case):
    changes, message = BAD[case]
    with pytest.raises(UserError) as caught:
        from_arrays(arrays(**changes))
    assert str(caught.value) == message


@pytest.mark.parametrize("value", [0, 1, -0.1, 1.5, float("nan"), "0.1", None])
def test_validation_fraction_out_of_range(value):
    with pytest.raises(UserError) as caught:
        from_arrays(arrays(), validation=value)
    expected = f"validation must be a number in (0, 1). Received: {value!r}."
    assert str(caught.value) == expected


def test_validation_is_taken_from_training_and_the_test_set_is_left_alone():
    given = arrays(x_val=None, y_val=None)
    data = from_arrays(given, validation=0.2, split_seed=3)
    assert [len(data.x_train), len(data.x_val), len(data.x_test)] == [24, 6, 9]
    assert np.bincount(data.y_val).tolist() == [2, 2, 2]
    np.testing.assert_array_equal(data.x_test, given["x_test"])
    rows = np.concatenate([data.x_train, data.x_val]).reshape(30, -1)
    order = np.lexsort(rows.T)
    original = given["x_train"].reshape(30, -1)
    np.testing.assert_array_equal(rows[order], original[np.lexsort(original.T)])
    # Each image still has its own label.
    label_of = {row.tobytes(): label for row, label in zip(original, given["y_train"], strict=True)}
    labels = np.concatenate([data.y_train, data.y_val])
    assert [label_of[row.tobytes()] for row in rows] == labels.tolist()


def test_too_few_images_for_a_validation_set():
    x, y = np.zeros((3, 4, 5, 1)), np.arange(3)
    with pytest.raises(UserError) as caught:
        from_arrays(arrays(x_train=x, y_train=y, x_val=None, y_val=None))
    assert str(caught.value) == (
        "x_train: too few images to take a validation set from. Received: 3 images, 3 classes,"
        " validation=0.1. Give x_val and y_val, more images, or a larger fraction."
    )


def test_fingerprint_is_of_names_shapes_dtypes_and_bytes():
    x = np.arange(6, dtype=np.uint8).reshape(1, 2, 3)
    expected = hashlib.sha256(b"x (1, 2, 3) |u1;" + bytes(range(6))).hexdigest()
    assert fingerprint({"x": x}) == expected
    assert fingerprint({"x": np.asfortranarray(x)}) == expected  # the layout does not matter
    others = [{"y": x}, {"x": x.reshape(1, 3, 2)}, {"x": x.view(np.int8)}, {"x": x[..., ::-1]}]
    assert len({expected, *map(fingerprint, others)}) == 5


def test_fingerprint_does_not_depend_on_the_split():
    given = arrays(x_val=None, y_val=None)
    for seed, share in ((0, 0.1), (1, 0.1), (0, 0.2)):
        data = from_arrays(given, split_seed=seed, validation=share)
        assert data.fingerprint == fingerprint(given)


def test_unknown_names_get_a_suggestion_only_when_one_is_close():
    assert str(unknown("attack", "pdg", ["fgsm", "pgd"])) == (
        "unknown attack. Received: 'pdg'. Expected one of: fgsm, pgd (did you mean 'pgd'?)"
    )
    assert str(unknown("attack", "PGD", ["fgsm", "pgd"])).endswith("(did you mean 'pgd'?)")
    assert str(unknown("attack", "zzz", ["fgsm", "pgd"])) == (
        "unknown attack. Received: 'zzz'. Expected one of: fgsm, pgd"
    )
    assert issubclass(UserError, ValueError)


def test_importing_the_package_imports_neither_keras_nor_sklearn():
    code = (
        "import sys, keras_emr.data as d; d.available(); d.epoch_order(3, 0, 0);"
        "bad = {'keras', 'sklearn', 'tensorflow', 'jax', 'torch'} & set(sys.modules);"
        "assert not bad, bad"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    subprocess.run([sys.executable, "-c", code], check=True, env=env)
