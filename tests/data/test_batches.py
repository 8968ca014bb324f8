"""The order of an epoch, and the batches made of it."""

import numpy as np
import pytest

from keras_emr.data import TrainBatches, epoch_order
from keras_emr.errors import UserError

X = np.arange(23, dtype=np.float32).reshape(23, 1, 1, 1)
Y = (np.arange(23) * 7 % 5).astype(np.int32)


def test_golden_orders():
    # Stored: a run is to be resumable on another platform and NumPy version.
    assert epoch_order(10, 0, 0).tolist() == [0, 2, 9, 1, 8, 5, 4, 3, 6, 7]
    assert epoch_order(10, 0, 1).tolist() == [5, 3, 7, 8, 2, 4, 1, 0, 6, 9]
    assert epoch_order(5, seed=0, epoch=0).tolist() == [0, 2, 1, 4, 3]  # as in the docstring
    assert epoch_order(10, 0, 0).dtype == np.int64


def test_orders_are_permutations_fixed_by_seed_and_epoch():
    orders = {(s, e): epoch_order(100, s, e) for s in range(5) for e in range(5)}
    for order in orders.values():
        np.testing.assert_array_equal(np.sort(order), np.arange(100))
    assert len({order.tobytes() for order in orders.values()}) == 25
    np.testing.assert_array_equal(orders[3, 4], epoch_order(100, 3, 4))


@pytest.mark.parametrize("epoch", [-1, 0.5, None])
def test_bad_epoch(epoch):
    with pytest.raises(UserError) as caught:
        epoch_order(10, 0, epoch)
    assert str(caught.value) == f"epoch must be a whole number >= 0. Received: {epoch!r}."


def test_an_epoch_of_training_batches_is_the_start_of_its_order():
    batches = TrainBatches(X, Y, batch_size=5, seed=11)
    assert (len(batches), batches.num_batches, batches.workers) == (4, 4, 1)
    seen = {}
    for epoch in (0, 1, 2):
        batches.set_epoch(epoch)
        got = list(batches)
        assert [x.shape for x, _ in got] == [(5, 1, 1, 1)] * 4
        examples = np.concatenate([x for x, _ in got]).ravel().astype(int)
        np.testing.assert_array_equal(examples, epoch_order(23, 11, epoch)[:20])
        np.testing.assert_array_equal(np.concatenate([y for _, y in got]), Y[examples])
        assert len(set(examples)) == 20
        seen[epoch] = examples
    assert set(np.concatenate(list(seen.values()))) == set(range(23))  # the remainder has its turn
    batches.set_epoch(1)  # going back, as a resumed run does
    np.testing.assert_array_equal(batches[2][0].ravel(), seen[1][10:15])


def test_training_starts_with_epoch_zero():
    np.testing.assert_array_equal(TrainBatches(X, Y, 4, 2)[0][1], Y[epoch_order(23, 2, 0)[:4]])


def test_fewer_examples_than_a_batch():
    batches = TrainBatches(X[:3], Y[:3], batch_size=64, seed=0)
    assert len(batches) == 1
    assert sorted(batches[0][0].ravel()) == [0, 1, 2]


@pytest.mark.parametrize("index", [-1, 3, 100])
def test_no_such_batch(index):
    batches = TrainBatches(X, Y, 7, 0)
    assert len(batches) == 3
    with pytest.raises(IndexError):
        batches[index]


@pytest.mark.parametrize("size", [0, -3, 2.0, None, "8"])
def test_bad_batch_size(size):
    with pytest.raises(UserError) as caught:
        TrainBatches(X, Y, size, 0)
    assert str(caught.value) == f"batch_size must be a whole number >= 1. Received: {size!r}."


@pytest.mark.parametrize(("n_x", "n_y"), [(0, 0), (23, 22)])
def test_bad_lengths(n_x, n_y):
    with pytest.raises(UserError) as caught:
        TrainBatches(X[:n_x], Y[:n_y], 4)
    assert str(caught.value) == (
        "batches: one label for each image is needed, and at least one image."
        f" Received: {n_x} images and {n_y} labels."
    )
