"""Augmentation and extra data: what changes, what does not, and that it can be repeated."""

import numpy as np
import pytest

from keras_emr.data import TrainBatches
from keras_emr.data.augment import cifar, padding
from keras_emr.data.extra import ExtraData, load_extra
from keras_emr.data.order import epoch_order, random_words
from keras_emr.errors import UserError

X = np.random.default_rng(0).random((40, 7, 5, 3), np.float32)
BIG = np.random.default_rng(1).random((1, 33, 29, 2), np.float32)
Y = (np.arange(40) % 4).astype(np.int32)


def word(down, right, flip):
    """A random word that stands for this crop and flip."""
    bits = [(down << 21) // 9 + 1, (right << 21) // 9 + 1, flip << 20]
    return sum(b << (21 * place) for place, b in enumerate(bits))


@pytest.mark.parametrize(("down", "right", "flip"), [(4, 4, 0), (4, 4, 1), (0, 8, 0), (7, 1, 1)])
def test_crop_and_flip_against_plain_indexing(down, right, flip):
    changed = cifar(BIG, np.array([word(down, right, flip)], np.uint64))[0]
    expected = np.zeros((41, 37, 2), np.float32)
    expected[4:37, 4:33] = BIG[0]
    expected = expected[down : down + 33, right : right + 29]
    np.testing.assert_array_equal(changed, expected[:, ::-1] if flip else expected)


@pytest.mark.parametrize(("side", "zeros"), [(224, 4), (32, 4), (28, 4), (24, 3), (9, 2), (8, 1)])
def test_small_images_are_padded_by_an_eighth(side, zeros):
    """By 4, half of an 8x8 digit leaves the window: such a run stayed at 10 %."""
    assert padding(side) == zeros
    side = min(side, 33)
    kept = cifar(np.ones((300, side, side, 1), np.float32), random_words(300, 1, 2))
    assert kept.sum(axis=(1, 2, 3)).min() == (side - zeros) ** 2  # a corner lost


def test_every_crop_and_flip_is_as_likely():
    ramp = np.zeros((1, 9, 9, 1), np.float32)
    ramp[0, 4, 4] = 1
    n = 20_000
    changed = cifar(np.repeat(ramp, n, 0), random_words(n, 1, 2))
    _, rows, columns, _ = np.nonzero(changed)
    assert len(rows) == n
    for places in (rows, columns):
        counts = np.bincount(places - 2, minlength=5)  # padded by 2: an eighth of 9
        assert len(counts) == 5 and abs(counts - n / 5).max() < 4.5 * (n / 5) ** 0.5
    pair = np.zeros((1, 9, 9, 1), np.float32)
    pair[0, 4, 4], pair[0, 4, 5] = 1, 2  # side by side, and in the window wherever it is
    rows = cifar(np.repeat(pair, n, 0), random_words(n, 1, 3)).reshape(n, -1)
    flipped = rows.argmax(axis=1) < np.where(rows == 1, 1, 0).argmax(axis=1)
    assert abs(flipped.mean() - 0.5) < 0.02


def test_augmented_batches_are_a_function_of_seed_epoch_and_index():
    batches, plain = TrainBatches(X, Y, 8, 3, "cifar"), TrainBatches(X, Y, 8, 3)
    batches.set_epoch(2)
    plain.set_epoch(2)
    first = [batches[i] for i in range(len(batches))]
    for i, (x, y) in enumerate(first):
        np.testing.assert_array_equal(y, plain[i][1])  # the order is the same
        assert x.shape == plain[i][0].shape and x.dtype == np.float32
        assert not np.array_equal(x, plain[i][0])
    batches.set_epoch(3)
    batches.set_epoch(2)
    for i in (4, 0, 2):  # in any order, as a run resumed inside an epoch asks
        np.testing.assert_array_equal(batches[i][0], first[i][0])
    again = TrainBatches(X, Y, 8, 3, "cifar")
    again.set_epoch(2)
    np.testing.assert_array_equal(again[1][0], first[1][0])
    # Another epoch changes the same image in another way.
    batches.set_epoch(3)
    orders = [epoch_order(40, 3, e) for e in (2, 3)]
    ways = {}
    for epoch, order in zip((2, 3), orders, strict=True):
        batches.set_epoch(epoch)
        images = np.concatenate([batches[i][0] for i in range(5)])
        ways[epoch] = images[np.argsort(order)]
    same = (ways[2] == ways[3]).all(axis=(1, 2, 3))
    assert same.mean() < 0.2
    assert not np.array_equal(TrainBatches(X, Y, 8, 4, "cifar")[0][0], batches[0][0])


def test_unknown_augmentation():
    with pytest.raises(UserError, match=r"unknown augment. Received: 'cifa'.*'cifar'"):
        TrainBatches(X, Y, 8, 0, "cifa")


def extra(m=25, ratio=0.3):
    x = np.arange(m, dtype=np.uint8).reshape(m, 1, 1, 1) * np.ones((1, 7, 5, 3), np.uint8)
    return ExtraData(x, (np.arange(m) % 4).astype(np.int32), ratio)


def test_extra_data_fill_their_share_of_every_batch():
    batches = TrainBatches(X, Y, 10, 5, extra=extra())
    assert (len(batches), batches.batch_size) == (40 // 7, 10)
    plain = TrainBatches(X, Y, 7, 5)
    used = []
    for epoch in range(4):
        batches.set_epoch(epoch)
        plain.set_epoch(epoch)
        for index in range(len(batches)):
            x, y = batches[index]
            assert (x.shape, x.dtype, y.shape) == ((10, 7, 5, 3), np.float32, (10,))
            np.testing.assert_array_equal(x[:7], plain[index][0])
            np.testing.assert_array_equal(y[:7], plain[index][1])
            ids = np.rint(x[7:, 0, 0, 0] * 255).astype(int)
            np.testing.assert_array_equal(y[7:], ids % 4)
            used += ids.tolist()
    assert len(used) == 60
    assert sorted(used[:25]) == sorted(used[25:50]) == list(range(25))  # all once, then again
    assert used[:25] != used[25:50]
    batches.set_epoch(1)  # a resumed run
    np.testing.assert_array_equal(
        np.rint(batches[2][0][7:, 0, 0, 0] * 255), used[(5 + 2) * 3 : (5 + 2) * 3 + 3]
    )


@pytest.mark.parametrize(("ratio", "batch_size"), [(0.3, 1), (0.01, 10), (0.99, 10), (1.0, 8)])
def test_a_share_of_nothing_or_everything(ratio, batch_size):
    with pytest.raises(UserError, match=f"extra_ratio: .* Received: {ratio} of batch_size"):
        TrainBatches(X, Y, batch_size, extra=extra(ratio=ratio))


@pytest.mark.parametrize("names", [("x_train", "y_train"), ("x", "y"), ("image", "label")])
def test_names_in_the_file_and_bytes_stay_bytes(tmp_path, names):
    given = extra()
    np.savez(tmp_path / "e.npz", **dict(zip(names, (given.x, given.y), strict=True)), other=X)
    loaded = load_extra(tmp_path / "e.npz", 0.5, (7, 5, 3), 4)
    assert loaded.x.dtype == np.uint8
    np.testing.assert_array_equal(loaded.x, given.x)
    np.testing.assert_array_equal(loaded.y, given.y)
    assert loaded.fingerprint == given.fingerprint


@pytest.mark.parametrize(
    ("arrays", "shape", "said"),
    [
        ({"x": X}, (7, 5, 3), "data file lacks arrays. Received: .* with x. Expected x_train and"),
        ({"x": X, "y": Y}, (8, 5, 3), r"must have the shape of the training images. Received: \(7"),
        ({"x": X, "y": Y + 1}, (7, 5, 3), "extra y: labels must be below .* Received: label 4"),
        ({"x": X * 255, "y": Y}, (7, 5, 3), r"extra x: images must lie in \[0, 1\]"),
    ],
)
def test_extra_data_that_do_not_fit(tmp_path, arrays, shape, said):
    np.savez(tmp_path / "e.npz", **arrays)
    with pytest.raises(UserError, match=said):
        load_extra(tmp_path / "e.npz", 0.5, shape, 4)


def test_no_such_file(tmp_path):
    with pytest.raises(UserError, match="data file not found"):
        load_extra(tmp_path / "e.npz", 0.5, (7, 5, 3), 4)
