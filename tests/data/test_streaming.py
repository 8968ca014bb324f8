"""Images that stay on disk: the same numbers as in memory, in every order of batches."""

import threading

import keras
import numpy as np
import pytest

import keras_emr as ke
from keras_emr.data import TrainBatches, load
from keras_emr.data.batches import EvalBatches
from keras_emr.data.order import epoch_order
from keras_emr.data.stored import MEMORY_BOUND, StoredImages, fits_memory
from keras_emr.errors import UserError
from keras_emr.training.experiment import train
from tests.data.pictures import folder, picture, save


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """The same folder in memory and on disk."""
    path = tmp_path_factory.mktemp("stream")
    folder(path, n=(30, 6, 6), shape=(8, 8, 3))
    return load(path, stream="never"), load(path, stream="always")


def test_the_same_data_set(both):
    held, stored = both
    assert (held.streamed, stored.streamed) == (False, True)
    assert held.fingerprint == stored.fingerprint
    for (x, y), (stored_x, stored_y) in zip(
        held.splits.values(), stored.splits.values(), strict=True
    ):
        assert isinstance(stored_x, StoredImages)
        assert (stored_x.shape, stored_x.dtype, stored_x.ndim) == (x.shape, x.dtype, 4)
        np.testing.assert_array_equal(stored_y, y)
        np.testing.assert_array_equal(np.asarray(stored_x), x)
        np.testing.assert_array_equal(stored_x[3], x[3])
        np.testing.assert_array_equal(stored_x[-2:], x[-2:])
        np.testing.assert_array_equal(stored_x[np.array([5, 0, 5])], x[[5, 0, 5]])
        assert (stored_x.min(), stored_x.max()) == (x.min(), x.max())


def test_divided_folders_are_the_same_too(tmp_path):
    for i in range(40):
        save(tmp_path / "ab"[i % 2] / f"{i}.png", picture(i, (4, 4)))
    held, stored = (load(tmp_path, stream=s, split_seed=5) for s in ("never", "always"))
    for (x, y), (stored_x, stored_y) in zip(
        held.splits.values(), stored.splits.values(), strict=True
    ):
        np.testing.assert_array_equal(stored_x[:], x)
        np.testing.assert_array_equal(stored_y, y)
        assert (stored_x.min(), stored_x.max()) == (x.min(), x.max())


def test_what_fits_memory():
    images = MEMORY_BOUND // (4 * 32 * 32 * 3)
    assert fits_memory(images, (32, 32, 3)) and not fits_memory(images + 1, (32, 32, 3))
    assert fits_memory(10**9, (32, 32, 3), "never") and not fits_memory(1, (1, 1, 1), "always")


class Seen(keras.Model):
    """Notes the labels of every batch that ``fit`` hands to it."""

    def __init__(self):
        super().__init__()
        self.w = self.add_weight(shape=(), name="w")
        self.seen = []

    def call(self, x):
        return keras.ops.sum(x, axis=(1, 2, 3)) * self.w

    def train_step(self, data):
        self.seen.append(np.array(data[1]))
        return super().train_step(data)


def test_fit_gets_each_epochs_batches_while_threads_read(both):
    """Readers run ahead of the training; they must not run ahead of the epoch's order."""
    stored = both[1]
    batches = TrainBatches(stored.x_train, np.arange(60), 8, seed=4)
    assert batches.workers == 1  # Keras's own queue starts before the epoch is known
    model = Seen()
    model.compile("sgd", "mse", run_eagerly=True)
    follow = keras.callbacks.LambdaCallback(on_epoch_begin=lambda e, _: batches.set_epoch(e))
    model.fit(batches, epochs=5, initial_epoch=2, shuffle=False, verbose=0, callbacks=[follow])
    expected = np.concatenate([epoch_order(60, 4, epoch)[:56] for epoch in (2, 3, 4)])
    np.testing.assert_array_equal(np.concatenate(model.seen), expected)


def test_training_gives_the_same_weights_and_metrics(both, tmp_path):
    def run(data, name):
        keras.utils.set_random_seed(0)
        model = ke.mlp(data.image_shape, data.classes)
        robust = ke.RobustClassifier(model, "at", attack=ke.PGD(0.05, steps=2))
        robust.compile(keras.optimizers.SGD(0.05))
        done = train(robust, data, tmp_path / name, epochs=2, batch_size=16, augment="cifar")
        rows = [{k: v for k, v in row.items() if k != "seconds"} for row in done.history]
        return rows, model.get_weights()

    (rows, weights), (stored_rows, stored_weights) = (
        run(data, name) for data, name in zip(both, ("held", "stored"), strict=True)
    )
    assert rows == stored_rows and len(rows) == 2
    for a, b in zip(weights, stored_weights, strict=True):
        np.testing.assert_array_equal(a, b)


def test_batches_are_begun_ahead_and_given_by_their_number(both, monkeypatch):
    stored = both[1]
    read, reading = [], threading.Event()
    plain = StoredImages.__getitem__

    def slow(self, key):
        read.append(np.array(key))
        if len(read) == 3:
            reading.set()
        return plain(self, key)

    monkeypatch.setattr(StoredImages, "__getitem__", slow)
    batches = TrainBatches(stored.x_train, np.arange(60), 8, seed=1)
    order = epoch_order(60, 1, 0)
    np.testing.assert_array_equal(batches[0][1], order[:8])
    assert reading.wait(10)  # two more, before anybody asks
    for index in (1, 5, 2, 2, 0):
        np.testing.assert_array_equal(batches[index][1], order[8 * index : 8 * index + 8])
    batches.set_epoch(7)  # whatever of the old epoch was begun is not of this one
    np.testing.assert_array_equal(batches[1][1], epoch_order(60, 1, 7)[8:16])


def test_validation_batches_hold_all_images_in_order(both):
    held, stored = both
    batches = EvalBatches(stored.x_val, stored.y_val, 5)
    assert [len(y) for _, y in batches] == [5, 5, 2]
    np.testing.assert_array_equal(np.concatenate([x for x, _ in batches]), held.x_val)
    with pytest.raises(IndexError):
        batches[3]
    with pytest.raises(UserError, match="batch_size"):
        EvalBatches(stored.x_val, stored.y_val, 0)


def test_an_image_that_goes_away_is_named(tmp_path):
    folder(tmp_path, n=(8, 2, 2))
    stored = load(tmp_path, stream="always")
    (tmp_path / "train" / "ant" / "03.png").unlink()
    with pytest.raises(UserError, match=r"image cannot be read: .*No such file.*03.png"):
        stored.x_train[:]
