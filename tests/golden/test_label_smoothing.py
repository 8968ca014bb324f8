"""Label smoothing against float64 NumPy, in each defense that has it."""

import keras
import numpy as np
import pytest

import keras_emr as ke
from keras_emr import losses


@pytest.fixture
def given():
    rng = np.random.default_rng(0)
    return rng.integers(0, 4, 6), rng.normal(size=(6, 4)), rng.normal(size=(6, 4))


def log_softmax(z):
    z = z - z.max(axis=1, keepdims=True)
    return z - np.log(np.exp(z).sum(axis=1, keepdims=True))


def smoothed(y, z, s):
    target = np.full(z.shape, s / (z.shape[1] - 1))
    target[np.arange(len(y)), y] = 1 - s
    return -(target * log_softmax(z)).sum(axis=1)


def kl(a, b):
    return (np.exp(log_softmax(a)) * (log_softmax(a) - log_softmax(b))).sum(axis=1)


def value(tensor):
    return keras.ops.convert_to_numpy(tensor)


def test_formula_and_what_it_is_in_keras_terms(given):
    y, z, _ = given
    found = value(losses.cross_entropy(keras.ops.convert_to_tensor(y), z, 0.3))
    np.testing.assert_allclose(found, smoothed(y, z, 0.3), rtol=1e-5)
    keras_own = keras.losses.CategoricalCrossentropy(
        from_logits=True, label_smoothing=0.3 * 4 / 3, reduction=None
    )
    np.testing.assert_allclose(found, value(keras_own(np.eye(4)[y], z)), rtol=1e-5)


@pytest.mark.parametrize(
    ("defense", "expected"),
    [
        (ke.Standard(label_smoothing=0.2), lambda y, a, b: smoothed(y, a, 0.2)),
        (
            ke.AdversarialTraining(clean_weight=0.25, label_smoothing=0.2),
            lambda y, a, b: 0.25 * smoothed(y, a, 0.2) + 0.75 * smoothed(y, b, 0.2),
        ),
        (ke.TRADES(3.0, 0.2), lambda y, a, b: smoothed(y, a, 0.2) + 3 * kl(a, b)),
        (ke.MAIL("at", burn_in=9, label_smoothing=0.2), lambda y, a, b: smoothed(y, b, 0.2)),
        (
            ke.MAIL("trades", burn_in=9, label_smoothing=0.2),
            lambda y, a, b: smoothed(y, a, 0.2) + 5 * kl(a, b),
        ),
    ],
    ids=lambda v: getattr(v, "name", ""),
)
def test_outer_losses(given, defense, expected):
    y, clean, adversarial = given
    loss = defense.loss(keras.ops.convert_to_tensor(y), clean, adversarial, 0)
    np.testing.assert_allclose(value(loss), expected(y, clean, adversarial), rtol=1e-5)
    again = type(defense).from_config(defense.get_config())
    assert again.label_smoothing == 0.2


def test_refused():
    with pytest.raises(ke.UserError, match="below 1"):
        ke.TRADES(label_smoothing=1.0)
    with pytest.raises(ke.UserError, match="no smoothed form"):
        ke.MAIL("mart", label_smoothing=0.1)
