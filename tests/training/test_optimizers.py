"""Optimizers and learning rates: formulas in NumPy, and resuming in the middle of a schedule."""

import math

import keras
import numpy as np
import pytest

import keras_emr as ke
from keras_emr.training.learning_rates import SCHEDULES, learning_rate
from keras_emr.training.optimizers import SGD, AdamW
from tests.builders import snapshot


def variables():
    kernel = keras.Variable(np.array([[1.0, -2.0], [0.5, 3.0]], "float32"), name="kernel")
    return [kernel, keras.Variable(np.array([2.0, -1.0], "float32"), name="bias")]


GRADIENTS = [
    (np.array([[0.3, 0.1], [-0.2, 0.4]]), np.array([1.0, -0.5])),
    (np.array([[-0.1, 0.2], [0.5, 0.0]]), np.array([0.2, 0.3])),
    (np.array([[0.0, 0.7], [0.1, -0.4]]), np.array([-0.6, 0.0])),
]


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("decayed", ["all", "kernels"])
def test_sgd_is_the_published_formula(nesterov, decayed):
    """Velocity of gradients, the rate outside: a drop of the rate acts at once."""
    rates = learning_rate("steps", 0.5, 1, 3, drops=[3])
    optimizer = SGD(rates, 0.9, nesterov, weight_decay=0.1, decayed=decayed)
    found = variables()
    wanted = [keras.ops.convert_to_numpy(v).astype("float64") for v in found]
    velocity = [0.0, 0.0]
    for step, gradients in enumerate(GRADIENTS):
        optimizer.apply([keras.ops.convert_to_tensor(g, "float32") for g in gradients], found)
        rate = 0.05 if step == 2 else 0.5
        for i, gradient in enumerate(gradients):
            decay = 0.1 * wanted[i] if decayed == "all" or i == 0 else 0.0
            velocity[i] = 0.9 * velocity[i] + gradient + decay
            move = gradient + decay + 0.9 * velocity[i] if nesterov else velocity[i]
            wanted[i] = wanted[i] - rate * move
    for a, b in zip(found, wanted, strict=True):
        np.testing.assert_allclose(keras.ops.convert_to_numpy(a), b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("cls", [SGD, AdamW])
def test_kernels_alone_can_be_decayed_also_after_loading(cls):
    optimizer = cls(0.5, weight_decay=0.1, decayed="kernels")
    config = keras.saving.serialize_keras_object(optimizer)
    for made in (optimizer, keras.saving.deserialize_keras_object(config)):
        found = variables()
        before = snapshot(found)
        made.apply([keras.ops.zeros(v.shape) for v in found], found)
        after = snapshot(found)
        np.testing.assert_allclose(after[0], 0.95 * before[0], rtol=1e-6)
        np.testing.assert_array_equal(after[1], before[1])


def test_clipping_bounds_the_norm_of_all_gradients():
    optimizer, found = SGD(1.0, momentum=0.0, global_clipnorm=0.1), variables()
    before = snapshot(found)
    optimizer.apply([keras.ops.convert_to_tensor(g, "float32") for g in GRADIENTS[0]], found)
    moved = np.concatenate([(a - b).ravel() for a, b in zip(before, snapshot(found), strict=True)])
    given = np.concatenate([g.ravel() for g in GRADIENTS[0]])
    np.testing.assert_allclose(moved, 0.1 * given / np.linalg.norm(given), rtol=1e-4, atol=1e-6)


def expected_rate(name, step, warmup):
    """Of rate 0.4, 10 steps an epoch, 8 epochs, drops at epochs 3 and 5 by 0.5."""
    rate = {
        "constant": 0.4,
        "steps": 0.4 * 0.5 ** ((step >= 20) + (step >= 40)),
        "cosine": 0.2 * (1 + math.cos(math.pi * min(step, 80) / 80)),
        "cyclic": 0.4 * (1 - abs(min(step, 80) / 40 - 1)),
    }[name]
    return rate * (min((step + 1) / (warmup * 10), 1) if warmup else 1)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("warmup", [0, 2])
def test_schedules(name, warmup):
    drops = [5, 3] if name == "steps" else None
    schedule = learning_rate(name, 0.4, 10, 8, drops, 0.5, warmup)
    if name == "constant" and not warmup:
        assert schedule == 0.4
        return
    again = type(schedule).from_config(schedule.get_config())
    for step in (0, 1, 19, 20, 39, 40, 60, 80, 95):
        value = float(schedule(step))
        assert value == pytest.approx(expected_rate(name, step, warmup), abs=1e-6), step
        assert float(again(step)) == value


@pytest.mark.parametrize(
    ("arguments", "fragment"),
    [
        (("linear", 0.1, 10, 8), "'linear'"),
        (("steps", 0.1, 10, 8), "none"),
        (("cosine", 0.1, 10, 8, [3]), "[3]"),
        (("steps", 0.1, 10, 8, [0]), ">= 1"),
    ],
)
def test_refused_schedules(arguments, fragment):
    with pytest.raises(ke.UserError) as caught:
        learning_rate(*arguments)
    assert fragment in str(caught.value)
