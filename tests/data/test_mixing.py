"""Mixup and cutmix: what becomes of images and labels, and that it can be repeated."""

import numpy as np
import pytest

from keras_emr.data import TrainBatches
from keras_emr.data.extra import ExtraData
from keras_emr.data.mixing import Mixing
from keras_emr.data.stored import StoredImages
from keras_emr.errors import UserError

RNG = np.random.default_rng(0)
X = RNG.random((32, 6, 8, 2), np.float32)
Y = (np.arange(32) % 4).astype(np.int32)


def solved(x, mixed, shares, y):
    """The permutation and share of a batch, from its labels and images alone."""
    own = np.eye(4)[y]
    level = min(s[c] for s, c in zip(shares, y, strict=True))  # some partner is of another class
    partners = (shares - level * own) / (1 - level)
    return level, partners


def test_mixup():
    mixing = Mixing(4, mixup=1.0)
    levels = []
    for step in range(200):
        mixed, shares = mixing(X, Y, 3, step)
        assert mixed.dtype == X.dtype and shares.dtype == np.float32
        level, partners = solved(X, mixed, shares, Y)
        levels.append(level)
        if 0.05 < level < 0.95:
            others = (mixed - level * X) / (1 - level)  # the partners' images
            distances = ((others[:, None] - X[None]) ** 2).sum((2, 3, 4))
            found = distances.argmin(1)
            assert sorted(found) == list(range(32)) and distances.min(1).max() < 1e-4
            np.testing.assert_allclose(partners, np.eye(4)[Y[found]], atol=1e-4)
    # Beta(1, 1) is uniform.
    assert abs(np.mean(levels) - 0.5) < 0.08 and abs(np.var(levels) - 1 / 12) < 0.02
    extreme = [Mixing(4, mixup=0.1)(X, Y, 3, s)[1].max() for s in range(100)]
    assert np.mean(np.array(extreme) > 0.95) > 0.6  # Beta(0.1, 0.1): nearly nothing or all


def test_cutmix():
    mixing = Mixing(4, cutmix=1.0)
    areas = []
    for step in range(60):
        mixed, shares = mixing(X, Y, 3, step)
        own = (mixed == X).all((0, 3))  # pixels of nobody's partner
        rows, columns = np.flatnonzero(~own.all(1)), np.flatnonzero(~own.all(0))
        box = np.zeros((6, 8), bool)
        if len(rows):
            assert len(rows) == np.ptp(rows) + 1 and len(columns) == np.ptp(columns) + 1
            box[np.ix_(rows, columns)] = True
            inside = mixed[:, box]
            distances = ((inside[:, None] - X[:, box][None]) ** 2).sum((2, 3))
            found = distances.argmin(1)
            assert sorted(found) == list(range(32)) and distances.min(1).max() == 0
            share = 1 - box.mean()
            want = share * np.eye(4)[Y] + (1 - share) * np.eye(4)[Y[found]]
            np.testing.assert_allclose(shares, want, atol=1e-6)
        np.testing.assert_array_equal(own, ~box)
        areas.append(box.mean())
    assert min(areas) < 0.05 and max(areas) > 0.4


def test_one_of_both_is_drawn():
    cut = mixed = 0
    for step in range(200):
        images, _ = Mixing(4, 1.0, 1.0)(X, Y, 0, step)
        changed = (images != X).any((0, 3))
        cut, mixed = cut + (not changed.all()), mixed + changed.all()
    assert cut > 60 and mixed > 60


@pytest.mark.parametrize("stored", [False, True])
def test_mixed_batches_are_a_function_of_seed_epoch_and_index(stored):
    """With crops, extra data and replays, in memory and on disk."""
    levels = np.rint(X * 255).astype(np.uint8)
    x = (levels / np.float32(255)).astype(np.float32)
    given = x
    if stored:
        extremes = levels.min((1, 2, 3)), levels.max((1, 2, 3))
        given = StoredImages(levels.__getitem__, np.arange(32), (6, 8, 2), extremes)
    extra = ExtraData(levels[:5], Y[:5], 0.25)
    options = {"augment": "cifar", "extra": extra, "mixing": Mixing(4, 0.4, 1.0)}
    batches = TrainBatches(given, Y, 8, 3, replays=2, **options)
    assert batches.mixes and len(batches) == 10 and not TrainBatches(given, Y, 8).mixes
    batches.set_epoch(2)
    first = [batches[i] for i in range(10)]
    reference = TrainBatches(x, Y, 8, 3, **options)
    reference.set_epoch(2)
    for i, (images, shares) in enumerate(first):
        assert images.shape == (8, 6, 8, 2) and shares.shape == (8, 4)
        np.testing.assert_allclose(shares.sum(1), 1, rtol=1e-6)
        np.testing.assert_array_equal(images, reference[i // 2][0])
        np.testing.assert_array_equal(shares, reference[i // 2][1])
    batches.set_epoch(3)
    assert not np.array_equal(batches[0][0], first[0][0])
    batches.set_epoch(2)
    for i in (7, 0, 4):  # in any order, as a run resumed inside an epoch asks
        np.testing.assert_array_equal(batches[i][0], first[i][0])
        np.testing.assert_array_equal(batches[i][1], first[i][1])


def test_numbered_examples():
    extra = ExtraData(np.zeros((5, 6, 8, 2), np.uint8), Y[:5], 0.25)
    batches = TrainBatches(X, Y, 8, 3, extra=extra, numbered=True)
    seen = []
    for i in range(len(batches)):
        x, y = batches[i]
        number = y["number"]
        assert number.dtype == np.int32
        own = number[:6]
        np.testing.assert_array_equal(x[:6], X[own])
        np.testing.assert_array_equal(y["label"], np.concatenate([Y[own], Y[number[6:] - 32]]))
        seen += own.tolist()
        assert (number[6:] >= 32).all() and (number[6:] < 37).all()
    assert len(set(seen)) == 30


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"mixup": -1}, "mixup must be a number >= 0. Received: -1"),
        ({"cutmix": float("nan")}, "cutmix must be a number >= 0. Received: nan"),
        ({}, "nothing to do. Received: mixup=0, cutmix=0"),
    ],
)
def test_no_such_mixing(options, said):
    with pytest.raises(UserError, match=said):
        Mixing(4, **options)
