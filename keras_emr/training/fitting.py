"""``fit``, from any step of any epoch on."""

from __future__ import annotations

import keras

from keras_emr.data.batches import RestOfEpoch
from keras_emr.training import snapshot
from keras_emr.training.callbacks import StopAfter
from keras_emr.training.checkpoints import Position


class Relay(keras.callbacks.Callback):
    """Hands the events of several calls of ``fit`` to callbacks that are to see a single one.

    Args:
        callbacks: list, told in this order.
        model, epochs, steps: of the whole training.
    """

    def __init__(self, callbacks, model, epochs, steps):
        super().__init__()
        self.inner = keras.callbacks.CallbackList(
            callbacks, model=model, epochs=epochs, steps=steps, verbose=0
        )
        self.first = 0  # steps that the epoch under way had behind it when `fit` was called
        self.begin = None  # called before the next batch, once

    def on_epoch_begin(self, epoch, logs=None):
        self.inner.on_epoch_begin(epoch, logs)

    def on_epoch_end(self, epoch, logs=None):
        self.inner.on_epoch_end(epoch, logs)
        self.first = 0

    def on_train_batch_begin(self, batch, logs=None):
        if self.begin is not None:
            self.begin()
            self.begin = None
        self.inner.on_train_batch_begin(self.first + batch, logs)

    def on_train_batch_end(self, batch, logs=None):
        self.inner.on_train_batch_end(self.first + batch, logs)

    def on_test_begin(self, logs=None):
        self.inner.on_test_begin(logs)

    def on_test_batch_begin(self, batch, logs=None):
        self.inner.on_test_batch_begin(batch, logs)

    def on_test_batch_end(self, batch, logs=None):
        self.inner.on_test_batch_end(batch, logs)

    def on_test_end(self, logs=None):
        self.inner.on_test_end(logs)


def warm_up(classifier, batches, count, keeper, found=None):
    """Train the maximizer alone on ``count`` batches, from where ``found`` stands.

    Args as :func:`fit_from`.
    """
    done = found.position.step if found else 0
    if done >= count:
        return
    turn, first = divmod(done, len(batches))
    turns = -(-count // len(batches))
    relay = Relay([StopAfter(count - done), keeper], classifier, turns, len(batches))
    if found:
        relay.begin = lambda: snapshot.restore_passing(classifier, found.arrays)
    keeper.warming_up = True
    if first:
        relay.first = first
        _learn(classifier, RestOfEpoch(batches, first), turn, turn + 1, relay)
        turn += 1
    if not (first and classifier.stop_training):
        _learn(classifier, batches, turn, turns, relay)
    keeper.warming_up = False


def _learn(classifier, batches, turn, turns, relay):
    classifier.fit_maximizer(
        batches, initial_epoch=turn, epochs=turns, shuffle=False, verbose=0, callbacks=[relay]
    )


def fit_from(classifier, batches, validation, epochs, callbacks, keeper, found=None):
    """Train from where ``found`` stands to the end of epoch ``epochs``, as one call of ``fit``.

    Args:
        batches: :class:`keras_emr.data.TrainBatches`.
        validation: ``(x, y, batch size)``, or ``(data set,)`` of batches.
        callbacks: without ``keeper``, which comes last.
        keeper: :class:`keras_emr.training.checkpointing.Checkpointer`.
        found: :class:`keras_emr.training.checkpoints.Checkpoint`; ``None``: from the start.
    """
    relay = Relay([*callbacks, keeper], classifier, epochs, len(batches))
    position = max(found.position, Position(0, 0)) if found else Position(0, 0)
    relay.inner.on_train_begin()
    if found:
        keeper.resume(found)
    epoch, going_on = position.epoch, True
    if position.step:
        relay.first = position.step
        if position.step < len(batches):
            relay.begin = lambda: snapshot.restore_passing(classifier, found.arrays)
            rest = RestOfEpoch(batches, position.step)
            _fit(classifier, rest, validation, epoch, epoch + 1, relay)
        else:
            _finish(classifier, batches, validation, epoch, relay, keeper, found)
        epoch, going_on = epoch + 1, not classifier.stop_training
        if epoch < epochs and going_on:
            keeper.undo_finalization()
    if epoch < epochs and going_on:
        _fit(classifier, batches, validation, epoch, epochs, relay)
    relay.inner.on_train_end()


def _fit(classifier, batches, validation, first, epochs, relay):
    x, *rest = validation
    given = {"validation_data": x}
    if rest:
        y, size = rest
        given = {"validation_data": (x, y), "validation_batch_size": size}
    classifier.fit(
        batches,
        **given,
        initial_epoch=first,
        epochs=epochs,
        shuffle=False,
        verbose=0,
        callbacks=[relay],
    )


def _finish(classifier, batches, validation, epoch, relay, keeper, found):
    """What is left of an epoch after its last step: validation, and the callbacks at its end."""
    classifier.stop_training = False
    relay.inner.on_epoch_begin(epoch)
    batches.set_epoch(epoch)
    snapshot.restore_passing(classifier, found.arrays)
    logs, metrics = found.state["logs"], classifier.get_metrics_result()
    keeper.ended(logs, snapshot.capture_passing(classifier))
    if set(logs) == set(metrics):  # as `fit` chooses
        logs = {name: float(value) for name, value in metrics.items()}
    x, *rest = validation
    given = dict(zip(("y", "batch_size"), rest, strict=False))
    judged = classifier.evaluate(x, **given, verbose=0, return_dict=True, callbacks=[relay])
    relay.on_epoch_end(epoch, {**logs, **{f"val_{name}": v for name, v in judged.items()}})
