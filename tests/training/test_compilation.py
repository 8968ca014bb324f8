"""No recompilation after the second step, and nothing that leaves the device inside a step.

By each backend's own counters, see ``tests/counters.py``: the last tests make sure that these
notice what they are for.
"""

import keras
import pytest

import keras_emr as ke
from keras_emr.data.batches import EvalBatches, TrainBatches
from keras_emr.defenses.adversarial_training import AdversarialTraining
from tests.builders import images, network
from tests.counters import BACKEND, watch

CASES = {
    "at": lambda steps: {"defense": "at", "attack": ke.PGD(0.1, steps=steps)},
    "trades-emr": lambda steps: {
        "defense": "trades",
        "attack": ke.PGD(0.1, steps=steps),
        "regularizers": [ke.EffectiveMarginRegularizer(0.1)],
    },
    "rnn-trades": lambda steps: {
        "defense": "trades",
        "attack": ke.LearnedAttack(0.1, maximizer=ke.LearnedMaximizer(hidden=2), steps=steps),
    },
}


def fit(n=48, epochs=3, callbacks=(), **options):
    x, y = images(n)
    robust = ke.RobustClassifier(network(), eval_attack=ke.PGD(0.1, steps=1), **options)
    robust.compile(keras.optimizers.Adam(1e-3))
    seen = watch()
    given = {"validation_data": images(16, seed=1), "callbacks": [seen, *callbacks], "verbose": 0}
    robust.fit(x, y, batch_size=16, epochs=epochs, **given)
    assert len(seen.compiled) == epochs * -(-n // 16)
    return seen


@pytest.mark.parametrize("name", CASES)
def test_nothing_is_compiled_after_the_second_step_and_nothing_leaves_the_device(name):
    seen = fit(**CASES[name](2))
    assert seen.compiled[0] >= 1
    assert seen.late == {"training step": 0, "first epoch": 0, "later epochs": 0}
    assert seen.transfers == []


@pytest.mark.skipif(BACKEND != "torch", reason="torch only")
@pytest.mark.parametrize("name", CASES)
def test_an_attacks_steps_upload_nothing(name):
    """Each upload waits for the device: Keras makes a few a step, an attack's step none."""
    short, long = (fit(epochs=1, **CASES[name](steps)).uploads for steps in (1, 4))
    assert 0 < short == long


@pytest.mark.skipif(BACKEND != "tensorflow", reason="tensorflow only")
@pytest.mark.parametrize("batchwise", [True, False])
def test_no_epoch_waits_for_a_search_of_buffer_sizes(monkeypatch, batchwise):
    """tf.data's tuner holds an epoch's end up: off where Keras feeds it from a PyDataset."""
    from keras.src.backend.tensorflow.trainer import TFEpochIterator

    begun, begin = [], TFEpochIterator.reset
    monkeypatch.setattr(TFEpochIterator, "reset", lambda self: begun.append(self) or begin(self))
    robust = ke.RobustClassifier(network(), **CASES["at"](1))
    robust.compile("sgd")
    x, y = images(8)
    train = (TrainBatches(x, y, 4),) if batchwise else (x, y, 4)
    validation = (EvalBatches(x, y, 4),) if batchwise else (x, y)
    datasets = []
    seen = keras.callbacks.LambdaCallback(
        on_epoch_end=lambda *_: datasets.append({id(it._distributed_dataset) for it in begun})
    )
    robust.fit(*train, validation_data=validation, epochs=3, callbacks=[seen], verbose=0)
    assert len({id(it) for it in begun}) == 2
    (tuned,) = {it._distributed_dataset.options().autotune.enabled is not False for it in begun}
    assert tuned is not batchwise
    assert datasets[0] == datasets[1] == datasets[2]


@pytest.mark.skipif(BACKEND != "jax", reason="tensorflow compiles for any number of images")
def test_a_last_batch_of_another_size_is_counted():
    late = fit(n=40, **CASES["at"](1)).late
    assert late["training step"] == 1 and late["first epoch"] >= 1


class Again(keras.callbacks.Callback):
    """Makes the training step anew in the middle of the second epoch."""

    def on_epoch_begin(self, epoch, logs=None):
        self._epoch = epoch

    def on_train_batch_begin(self, batch, logs=None):
        if self._epoch == 1 and batch == 1:
            if BACKEND == "jax":
                import jax

                jax.clear_caches()
            else:
                self.model.make_train_function(force=True)


@pytest.mark.skipif(BACKEND == "torch", reason="torch compiles nothing")
def test_a_step_that_is_compiled_again_is_counted():
    late = fit(epochs=2, callbacks=[Again()], **CASES["at"](1)).late
    assert late["first epoch"] == 0 and late["later epochs"] >= 1


class Peeking(AdversarialTraining):
    """Looks at the loss inside the step."""

    def loss(self, *args, **kwargs):
        value = super().loss(*args, **kwargs)
        if BACKEND == "torch":
            float(value.detach().sum())
        elif BACKEND == "jax":
            import jax

            jax.debug.callback(lambda v: None, value)
        else:
            import tensorflow as tf

            tf.py_function(lambda v: None, [value], [])
        return value


def test_a_value_that_is_read_inside_the_step_is_counted():
    seen = fit(epochs=1, defense=Peeking(), attack=ke.PGD(0.1, steps=1))
    assert seen.transfers
