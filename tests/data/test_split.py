"""The stratified split, and the digits that are split with it."""

import numpy as np
import pytest

from keras_emr.data import load, stratified_split
from keras_emr.data.dataset import fingerprint
from keras_emr.data.digits import load_digits_arrays
from keras_emr.errors import UserError

Y = np.array([0] * 10 + [1] * 6 + [2] * 4)


def test_golden_split():
    # Stored: the split is to stay the same on every platform and NumPy version.
    kept, taken = stratified_split(Y, 0.3, 0)
    assert kept.tolist() == [0, 1, 3, 4, 5, 6, 8, 11, 13, 14, 15, 16, 18, 19]
    assert taken.tolist() == [2, 7, 9, 10, 12, 17]
    assert kept.dtype == taken.dtype == np.int64


@pytest.mark.parametrize(
    ("fraction", "expected"),
    [
        (0.3, [3, 2, 1]),  # exact shares 3, 1.8, 1.2: 1.8 is rounded up
        (0.25, [3, 1, 1]),  # 2.5, 1.5, 1: five are wanted, and the tie goes to the lower class
        (0.5, [5, 3, 2]),
        (0.05, [1, 0, 0]),  # 0.5, 0.3, 0.2
        (0.02, [0, 0, 0]),  # round(0.4) = 0
        (0.95, [9, 5, 3]),  # round(19) = 19, but every class keeps one example
    ],
)
def test_shares(fraction, expected):
    _, taken = stratified_split(Y, fraction, 5)
    assert np.bincount(Y[taken], minlength=3).tolist() == expected


@pytest.mark.parametrize("fraction", [0.01, 0.1, 1 / 3, 0.5, 0.77, 0.9])
@pytest.mark.parametrize("n", [100, 101, 997])
def test_the_size_is_exact_and_the_parts_make_the_whole(n, fraction):
    y = np.random.default_rng(n).integers(0, 7, n)
    kept, taken = stratified_split(y, fraction, 1)
    assert len(taken) == round(fraction * n)
    np.testing.assert_array_equal(np.sort(np.concatenate([kept, taken])), np.arange(n))
    assert (np.diff(kept) > 0).all() and (np.diff(taken) > 0).all()
    assert np.abs(np.bincount(y[taken], minlength=7) - fraction * np.bincount(y)).max() < 1


def test_every_example_is_as_likely_as_another():
    y = np.repeat([0, 1], 10)
    times = sum(np.bincount(stratified_split(y, 0.3, s)[1], minlength=20) for s in range(2000))
    assert times.sum() == 2000 * 6
    # 600 expected, standard deviation sqrt(2000 * 0.3 * 0.7) = 20.5; fixed seeds, no flakiness
    assert np.abs(times - 600).max() < 4 * 20.5


def test_seeds():
    first = stratified_split(Y, 0.3, 7)[1]
    np.testing.assert_array_equal(first, stratified_split(Y.astype(np.uint8), 0.3, 7)[1])
    assert len({tuple(stratified_split(Y, 0.3, seed)[1]) for seed in range(10)}) > 5


@pytest.mark.parametrize("seed", [-1, 2**63, 0.5, None])
def test_bad_seed(seed):
    with pytest.raises(UserError) as caught:
        stratified_split(Y, 0.3, seed)
    assert str(caught.value) == f"seed must be a whole number in [0, 2**63). Received: {seed!r}."


@pytest.mark.parametrize("fraction", [0, 1, -1, 2, float("nan")])
def test_bad_fraction(fraction):
    with pytest.raises(UserError) as caught:
        stratified_split(Y, fraction, 0)
    assert str(caught.value) == f"fraction must be a number in (0, 1). Received: {fraction!r}."


def test_digits_arrays():
    x, y = load_digits_arrays()
    assert (x.shape, x.dtype, y.shape, y.dtype) == ((1797, 8, 8, 1), np.float32, (1797,), np.int32)
    assert (x.min(), x.max()) == (0.0, 1.0)
    np.testing.assert_array_equal(x * 16, np.round(x * 16))
    assert y[:10].tolist() == list(range(10))
    assert np.bincount(y).tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    assert x[0, 0, :, 0].tolist() == [0, 0, 5 / 16, 13 / 16, 9 / 16, 1 / 16, 0, 0]


def test_digits_are_split_by_class_and_nothing_is_lost():
    data = load("digits")
    assert [len(data.x_train), len(data.x_val), len(data.x_test)] == [1257, 180, 360]
    assert [len(data.y_train), len(data.y_val), len(data.y_test)] == [1257, 180, 360]
    assert (data.image_shape, data.classes) == ((8, 8, 1), 10)
    assert data.class_names == tuple("0123456789")
    assert np.bincount(data.y_train).tolist() == [124, 127, 124, 128, 127, 128, 127, 125, 121, 126]
    assert np.bincount(data.y_val).tolist() == [18] * 10
    assert np.bincount(data.y_test).tolist() == [36, 37, 35, 37, 36, 36, 36, 36, 35, 36]

    x, y = load_digits_arrays()
    whole = sorted((image.tobytes(), label) for image, label in zip(x, y.tolist(), strict=True))
    assert len(set(whole)) == 1797  # no duplicates: so the parts below are disjoint
    parts = [
        (image.tobytes(), label)
        for part in ("train", "val", "test")
        for image, label in zip(
            getattr(data, f"x_{part}"), getattr(data, f"y_{part}").tolist(), strict=True
        )
    ]
    assert sorted(parts) == whole


def test_digits_depend_on_the_seed_and_on_nothing_else():
    first, again, other = load("digits"), load("digits", split_seed=0), load("digits", split_seed=1)
    for part in ("train", "val", "test"):
        np.testing.assert_array_equal(getattr(first, f"x_{part}"), getattr(again, f"x_{part}"))
        assert not np.array_equal(getattr(first, f"y_{part}"), getattr(other, f"y_{part}"))
    assert first.y_test[:8].tolist() == [2, 7, 9, 2, 7, 5, 7, 5]
    assert first.y_val[:8].tolist() == [3, 0, 2, 5, 0, 7, 2, 7]
    x, y = load_digits_arrays()
    assert first.fingerprint == other.fingerprint == fingerprint({"x": x, "y": y})
    assert first.fingerprint == "dffd2678feac3b5c3bdcfe373126ce5a0fbe9590784aecbb5d2d376b45d4ad50"


def test_digits_validation_is_a_share_of_the_whole():
    data = load("digits", validation=0.2)
    assert [len(data.x_train), len(data.x_val), len(data.x_test)] == [1078, 359, 360]
    with pytest.raises(UserError) as caught:
        load("digits", validation=0.8)
    assert str(caught.value) == "validation must be a number in (0, 0.8). Received: 0.8."
