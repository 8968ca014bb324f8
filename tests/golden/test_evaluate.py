"""Accuracy under attack: which examples count, which image is returned, and batching."""

import keras
import numpy as np
import pytest
from keras import ops

from keras_emr import PGD, evaluate_attack
from keras_emr.sampling import ExampleSampler
from tests.golden import reference as ref

K, D = 4, 8
SHAPE = (2, 2, 2)


def trained_like(n=50):
    """A float32 ReLU network, images and labels, about a fifth of them wrong."""
    rng = np.random.default_rng(0)
    weights = ref.mlp_weights(rng, D, 16, K, scale=2.0)
    x = rng.uniform(size=(n, *SHAPE)).astype("float32")
    y = ref.mlp_forward(weights, "relu", x.astype("float64"))[0].argmax(-1)
    y[::5] = (y[::5] + 1) % K
    model = ref.build_mlp([w.astype("float32") for w in weights], "relu", SHAPE, "float32")
    return model, weights, x, y


def predictions(weights, x):
    return ref.mlp_forward(weights, "relu", x.astype("float64"))[0].argmax(-1)


@pytest.mark.parametrize(
    "attack",
    [
        PGD(0.08, steps=4, restarts=2),
        PGD(0.15, "l2", steps=4, restarts=2, objective="margin"),
    ],
    ids=["linf", "l2-margin"],
)
def test_batch_size_does_not_matter_and_flags_are_right(attack):
    model, weights, x, y = trained_like()
    small = evaluate_attack(model, attack, x, y, batch_size=7)
    large = evaluate_attack(model, attack, x, y, batch_size=64)
    assert np.array_equal(small.robust, large.robust)
    assert np.array_equal(small.correct, large.correct)
    np.testing.assert_allclose(small.x_adv, large.x_adv, atol=1e-5)
    correct = predictions(weights, x) == y
    assert np.array_equal(large.correct, correct) and correct.sum() == 40
    assert np.array_equal(large.x_adv[~correct], x[~correct])
    assert not large.robust[~correct].any()
    # Whoever is not robust but was correct carries an image that fools; the others do not.
    fooled = predictions(weights, large.x_adv) != y
    assert np.array_equal(large.robust, correct & ~fooled)
    assert 5 < large.robust.sum() < 35
    assert large.accuracy == 40 / 50
    assert large.robust_accuracy == large.robust.sum() / 50
    size = ref.vector_norm(large.x_adv.astype("float64") - x, attack.norm)
    assert size.max() <= attack.epsilon + 1e-6
    assert large.max_perturbation == pytest.approx(size.max(), abs=1e-6)


def test_order_and_company_do_not_matter():
    """The numbers of an example depend on its index: alone at index 0 it is the same."""
    model, _, x, y = trained_like()
    attack = PGD(0.08, steps=2)
    together = evaluate_attack(model, attack, x, y, batch_size=16)
    first = evaluate_attack(model, attack, x[:20], y[:20], batch_size=16)
    np.testing.assert_allclose(first.x_adv, together.x_adv[:20], atol=1e-5)
    again = evaluate_attack(model, attack, x, y, batch_size=16, seed=1)
    assert np.abs(again.x_adv - together.x_adv).max() > 1e-3


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_epsilon_zero_is_the_clean_accuracy(norm):
    model, weights, x, y = trained_like()
    result = evaluate_attack(model, PGD(0.0, norm, steps=3, restarts=2), x, y)
    assert np.array_equal(result.x_adv, x)
    assert result.robust_accuracy == result.accuracy == (predictions(weights, x) == y).mean()
    assert result.max_perturbation == 0


class Halves(keras.layers.Layer):
    """Logits right of 0.5 (confident of nothing, class 0) and left of it (class 1, fairly sure)."""

    def compute_output_shape(self, shape):
        return (shape[0], 3)

    def call(self, x):
        v = ops.reshape(x, (-1, 1))
        right, left = (ref.tensor([z], "float32") for z in ([1.0, 0.99, 0.99], [1.0, 1.2, -9.0]))
        return ops.where(v >= 0.5, right, left) + 0.0 * v


def test_restarts_break_by_prediction():
    """Cross-entropy of class 0 is lower on the left, but only the left fools."""
    model = keras.Sequential([keras.Input((1, 1, 1)), Halves()])
    n, restarts, epsilon = 48, 3, 0.4
    x, y = np.full((n, 1, 1, 1), 0.5, "float32"), np.zeros(n, int)
    y[::8] = 1  # wrong on the clean image; the attack would put half of them right
    attack = PGD(epsilon, steps=2, start="uniform", restarts=restarts)
    result = evaluate_attack(model, attack, x, y, batch_size=10, seed=5)
    # No gradient anywhere: the last iterate is the start.
    starts = np.stack(
        [
            ref.numpy(ExampleSampler(5, r, range(n)).uniform((n, 1, 1, 1))).ravel()
            for r in range(restarts)
        ]
    )
    images = 0.5 + epsilon * starts
    fools = images < 0.5
    assert np.array_equal(result.robust, (y == 0) & ~fools.any(0))
    assert 0 < result.robust.sum() < n / 2
    assert (fools[:, y == 0].sum(0) == 1).any()
    got = result.x_adv.ravel()
    for i in range(n):
        if y[i] == 1:
            assert got[i] == 0.5
        elif fools[:, i].any():  # the first run that fools: later ones are skipped
            assert got[i] == pytest.approx(images[fools[:, i].argmax(), i], abs=1e-6)
        else:
            assert np.abs(got[i] - images[:, i]).min() < 1e-6
    assert result.accuracy == (y == 0).mean()
    assert result.robust_accuracy == result.robust.sum() / n
