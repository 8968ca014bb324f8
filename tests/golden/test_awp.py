"""AWP's step on a linear softmax classifier, in float64 NumPy."""

import keras
import numpy as np
import pytest

import keras_emr as ke
from keras_emr.training.optimizers import SGD
from keras_emr.training.weight_perturbation import AWP

RATE, DECAY, BETA = 0.5, 0.1, 3.0


def softmax(z):
    e = np.exp(z - z.max(axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True)


def gradient(defense, w, b, x, y, x_adv):
    """Of the batch mean of AT's or TRADES's loss, for the kernel and the bias."""
    n, hot = len(x), np.eye(w.shape[1])[y]
    q = softmax(x_adv @ w + b)
    if defense == "at":
        dz = (q - hot) / n
        return x_adv.T @ dz, dz.sum(axis=0)
    p = softmax(x @ w + b)
    ratio = np.log(p / q)
    clean = (p - hot + BETA * p * (ratio - (p * ratio).sum(axis=1, keepdims=True))) / n
    attacked = BETA * (q - p) / n
    return x.T @ clean + x_adv.T @ attacked, (clean + attacked).sum(axis=0)


class Shift(ke.PGD):
    """An attack by a fixed shift: what AWP does is to be seen alone."""

    def __call__(self, objective, x, sampler, classes=None):
        return keras.ops.clip(x + 0.1, 0.0, 1.0)


@pytest.mark.parametrize("defense", ["at", "trades"])
@pytest.mark.parametrize("warmup", [0, 1])
def test_awp_step(defense, warmup):
    rng = np.random.default_rng(0)
    x, y = rng.uniform(size=(8, 2, 2, 1)).astype("float32"), rng.integers(0, 3, 8)
    w, b = rng.normal(size=(4, 3)), rng.normal(size=3)
    model = keras.Sequential([keras.Input((2, 2, 1)), keras.layers.Flatten()])
    model.add(keras.layers.Dense(3))
    model.set_weights([w, b])
    chosen = ke.TRADES(BETA) if defense == "trades" else "at"
    robust = ke.RobustClassifier(
        model, chosen, attack=Shift(0.1), weight_perturbation=AWP(0.2, warmup)
    )
    robust.compile(SGD(RATE, momentum=0.0, weight_decay=DECAY))
    loss = robust.train_on_batch(x, y, return_dict=True)["loss"]

    flat, moved = x.reshape(8, 4).astype("float64"), np.clip(x + 0.1, 0, 1).reshape(8, 4)
    w, b = w.astype("float32").astype("float64"), b.astype("float32").astype("float64")
    g, _ = gradient(defense, w, b, flat, y, moved)
    v = 0.0 if warmup else 0.2 * np.linalg.norm(w) / np.linalg.norm(g) * g
    at_w, at_b = gradient(defense, w + v, b, flat, y, moved)  # the bias is not moved
    wanted_w = w + v - RATE * (at_w + DECAY * (w + v)) - v
    wanted_b = b - RATE * (at_b + DECAY * b)
    found_w, found_b = model.get_weights()
    np.testing.assert_allclose(found_w, wanted_w, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found_b, wanted_b, rtol=1e-4, atol=1e-5)
    # The loss that is logged is that at the moved weights.
    q = softmax(moved @ (w + v) + b)
    wanted = -np.log(q[np.arange(8), y])
    if defense == "trades":
        p = softmax(flat @ (w + v) + b)
        wanted = -np.log(p[np.arange(8), y]) + BETA * (p * np.log(p / q)).sum(axis=1)
    assert float(loss) == pytest.approx(wanted.mean(), rel=1e-4)


def test_awp_shows_batch_norm_the_moved_weights_once():
    """A pass of the loss updates the moving mean, at ``W + gamma v``; the proxy's pass does not."""
    rng = np.random.default_rng(0)
    x, y = rng.uniform(size=(8, 2, 2, 1)).astype("float32"), rng.integers(0, 3, 8)
    kernel = rng.normal(size=(4, 5)).astype("float32")
    images = np.clip(x + 0.1, 0, 1).reshape(8, 4)
    unmoved = 0.1 * (images @ kernel).mean(axis=0)
    for gamma in (0.0, 0.3):
        model = keras.Sequential([keras.Input((2, 2, 1)), keras.layers.Flatten()])
        model.add(keras.layers.Dense(5, use_bias=False))
        model.add(keras.layers.BatchNormalization(momentum=0.9))
        model.add(keras.layers.Dense(3))
        model.layers[1].kernel.assign(kernel)
        robust = ke.RobustClassifier(model, "at", Shift(0.1), weight_perturbation=AWP(gamma))
        robust.compile(SGD(0.0))
        robust.train_on_batch(x, y)
        np.testing.assert_allclose(model.get_weights()[0], kernel, atol=1e-6)
        mean = keras.ops.convert_to_numpy(model.layers[2].moving_mean)
        if gamma:
            assert np.abs(mean - unmoved).max() > 1e-3
        else:
            np.testing.assert_allclose(mean, unmoved, rtol=1e-4, atol=1e-6)


def test_refused():
    with pytest.raises(ke.UserError, match=r"Received: -0\.1"):
        AWP(-0.1)
    model = keras.Sequential([keras.Input((2, 2, 1)), keras.layers.Flatten()])
    model.add(keras.layers.Dense(3))
    with pytest.raises(ke.UserError, match="defense='standard'"):
        ke.RobustClassifier(model, "standard", weight_perturbation=AWP())
