"""EMR's pass and the loss's own, computed together: the same numbers, fewer passes."""

import keras
import numpy as np
import pytest
from keras import layers

import keras_emr as ke
from keras_emr.network import Network
from tests.builders import images, network, snapshot

X, Y = images(16)
FLATTEN = 4  # of the layers of `convolutional`
CASES = {
    "at": ("at", {}),
    "trades": ("trades", {}),
    "both sides": ("trades", {"at": "both"}),
    "clean": ("standard", {}),
    "exact": ("at", {"weighting": "exact", "norm": "l1"}),
}


def convolutional(dropout=0.5):
    """Convolutions, max pooling and, half way through the dense layers, dropout."""
    keras.utils.set_random_seed(1)
    stack = [keras.Input((6, 6, 1)), layers.Rescaling(2.0, -1.0)]
    stack += [layers.Conv2D(4, 3), layers.ReLU(), layers.MaxPooling2D(2), layers.Flatten()]
    stack += [layers.Dense(9, activation="tanh"), layers.Dropout(dropout, seed=5)]
    return keras.Sequential([*stack, layers.Dense(8, activation="relu"), layers.Dense(3)])


def trained(model, defense, emr, steps=2):
    attack = None if defense == "standard" else ke.PGD(0.1, steps=2)
    regularizer = ke.EffectiveMarginRegularizer(0.3, **emr)
    robust = ke.RobustClassifier(model, defense, attack, [regularizer], seed=3)
    robust.compile(keras.optimizers.SGD(0.1))
    robust.optimizer.build(robust.trainable_variables)
    for _ in range(steps):
        logs = robust.train_on_batch(X, Y, return_dict=True)
    return logs, snapshot(model.variables)


@pytest.mark.parametrize("case", CASES)
def test_sharing_changes_no_number(case, monkeypatch):
    defense, emr = CASES[case]
    logs, weights = trained(convolutional(), defense, emr)
    monkeypatch.setattr(ke.EffectiveMarginRegularizer, "slopes_at", lambda self, attacked: ())
    apart, weights_apart = trained(convolutional(), defense, emr)
    assert set(logs) == set(apart) and logs["emr"] > 0
    for name in logs:
        assert logs[name] == pytest.approx(apart[name], rel=1e-5), name
    for one, other, start in zip(
        weights, weights_apart, snapshot(convolutional().variables), strict=True
    ):
        assert (one != start).any()
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6)


def calls_of(model, layer, **step):
    """How often one step calls ``layer``'s own computation."""
    defense = ke.RobustClassifier(
        model, "at", ke.PGD(0.1, steps=2), [ke.EffectiveMarginRegularizer(0.1)], seed=3
    )
    defense.compile(keras.optimizers.SGD(0.1))
    made, call = [], layer.call
    object.__setattr__(layer, "call", lambda *a, **o: made.append(1) or call(*a, **o))
    x, y = keras.ops.convert_to_tensor(X), keras.ops.convert_to_tensor(Y)
    if step:
        step = {"x_adv": x}
    defense.robust_step(x, y, None, training=True, **step)
    return len(made)


def test_layers_before_the_dropout_are_called_once_for_both():
    # Two attack steps, the clean accuracy, the loss with EMR.
    model = convolutional()
    assert calls_of(model, model.layers[FLATTEN]) == 2 + 1 + 1
    model = convolutional()
    assert calls_of(model, model.layers[-1]) == 2 + 1 + 2
    # Images that may depend on what is learned: not shared.
    model = convolutional()
    assert calls_of(model, model.layers[FLATTEN], found=True) == 1 + 2


def dense(**options):
    return keras.Sequential([keras.Input((4,)), layers.Dense(3, **options)])


class Own(layers.Layer):
    def call(self, x):
        return x


@pytest.mark.parametrize(
    ("model", "shared"),
    [
        (lambda: convolutional(), True),
        (lambda: keras.Sequential([convolutional(), layers.Dense(3)]), True),
        (lambda: network(batch_norm=True), False),
        (lambda: network(batch_norm=False), True),
        (lambda: keras.Sequential([keras.Input((4,)), Own(), layers.Dense(3)]), False),
        (lambda: keras.Sequential([keras.Input((4,)), layers.Lambda(lambda x: x)]), False),
        (lambda: dense(activation="tanh"), True),
        (lambda: dense(activation=lambda x: keras.random.dropout(x, 0.5)), False),
        (lambda: dense(activation=Own()), False),
        (lambda: dense(activation=layers.Dropout(0.5)), False),
        (lambda: dense(activation=layers.BatchNormalization()), False),
        (lambda: dense(activity_regularizer="l2"), False),
        (lambda: dense(dtype="mixed_bfloat16"), False),
    ],
)
def test_which_networks_share(model, shared):
    assert Network(model()).shares_passes is shared


def test_nothing_stays_changed_or_remembered():
    model, x = convolutional(), keras.ops.convert_to_tensor(X)
    trained(model, "at", {}, steps=1)
    assert all("call" not in vars(layer) for layer in model.layers)
    network = Network(model)
    network(x, False, sloped=True)
    before = numbers(network(x, False, sloped=True))
    model.layers[1].kernel.assign(model.layers[1].kernel + 1)
    assert np.abs(numbers(network(x, False, sloped=True)) - before).max() > 1e-3


def numbers(tensor):
    return keras.ops.convert_to_numpy(keras.ops.stop_gradient(tensor))
