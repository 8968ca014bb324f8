"""What can be attacked, what it answers, and how many images fit."""

import keras
import numpy as np
import pytest
from keras import layers

import keras_emr as ke
from keras_emr import backend
from keras_emr.attacks.query import margins, wrong
from keras_emr.evaluation.distances import minimum_distances
from keras_emr.evaluation.session import perturbation, within
from keras_emr.evaluation.target import FunctionTarget, KerasTarget, auto_batch_size
from tests.builders import images, network

X, Y = images(20)


def test_batches_of_every_size_answer_the_same():
    model = network()
    target = KerasTarget(model, batch_size=64)
    whole = target.predict(np.concatenate([X] * 5))
    for n in (1, 15, 17, 20):
        np.testing.assert_allclose(target.predict(X[:n]), whole[:n], atol=1e-6)
    assert target.asked == 100 + 53
    counts = ("compilations", "experimental_get_tracing_count")  # jax, tensorflow
    count = next(
        (getattr(target._compiled, c) for c in counts if hasattr(target._compiled, c)), int
    )
    assert count() <= min(backend.SHAPES_COMPILED, 4)


def test_probabilities_become_logarithms_once_and_for_all():
    logits = np.random.default_rng(0).normal(size=(50, 3)) * 5
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    rounded = np.round(p, 4)  # no longer sums to one exactly
    rows = iter([rounded[:40], rounded[40:] * 0.9])
    target = FunctionTarget(lambda x: next(rows), batch_size=64)
    np.testing.assert_allclose(
        target.predict(X[:1].repeat(40, 0)), np.log(np.maximum(rounded[:40], 1e-45))
    )
    np.testing.assert_allclose(
        target.predict(X[:1].repeat(10, 0)), np.log(np.maximum(rounded[40:] * 0.9, 1e-45))
    )
    logits_first = FunctionTarget(lambda x: np.abs(logits[: len(x)]) + 1)
    assert (logits_first.predict(X[:5]) == np.abs(logits[:5]) + 1).all()


@pytest.mark.parametrize("answer", [np.zeros((5, 1)), np.zeros((4, 3)), np.zeros(5)])
def test_other_answers_are_refused(answer):
    with pytest.raises(ke.UserError, match=r"must give \(M, K\) scores"):
        FunctionTarget(lambda x: answer).predict(X[:5])


def test_scores_that_are_not_finite_are_no_classification():
    scores = np.array([[3.0, 1.0], [np.nan, 0.0], [np.inf, 0.0], [np.nan, np.nan]])
    y = np.zeros(4, int)
    assert wrong(y, scores).tolist() == [False, True, True, True]
    assert margins(y, scores).tolist() == [2.0, -np.inf, -np.inf, -np.inf]


class Overflows(keras.Model):
    """The first class wins everywhere; above 0.9 the logits are NaN."""

    def call(self, x, training=None):
        top = keras.ops.max(keras.ops.reshape(x, (-1, 36)), axis=-1)
        nan = keras.ops.where(top > 0.9, float("nan"), 0.0)
        return keras.ops.stack([nan + 1.0, nan, nan], axis=-1)


def test_an_image_with_nan_breaks_its_example():
    model = Overflows()
    x = np.full((6, 6, 6, 1), 0.85, "float32")
    model(x)
    result = ke.evaluate_attack(model, ke.PGD(0.1, steps=2), x, np.zeros(6, int))
    assert result.accuracy == 1.0 and result.robust_accuracy == 0.0


def test_l2_rounding_is_taken_back_and_no_more():
    rng = np.random.default_rng(0)
    x = rng.uniform(0.2, 0.8, (3, 8, 8, 1)).astype("float32")
    direction = rng.normal(size=x.shape)
    direction /= np.sqrt((direction**2).sum((1, 2, 3), keepdims=True))
    lengths = np.array([0.1, 0.1 * (1 + 8e-6), 0.11])[:, None, None, None]
    found = (x + lengths * direction).astype("float32")
    back = within(ke.PGD(0.1, "l2"), x, found)
    sizes = perturbation("l2", x, back)
    assert sizes[1] <= 0.1 and sizes[1] == pytest.approx(0.1, rel=1e-5)
    np.testing.assert_array_equal(back[[0, 2]], found[[0, 2]])


def test_the_batch_size_follows_the_layers():
    small, large = (
        keras.Sequential([keras.Input((32, 32, 3)), layers.Conv2D(filters, 3, padding="same")])
        for filters in (8, 512)
    )
    # (32 * 32 * 3 + 32 * 32 * 512) * 12 bytes = 6.3 MB an image: 2^30 / that = 169.
    assert auto_batch_size(large, (32, 32, 3)) == 128
    assert auto_batch_size(small, (32, 32, 3)) == 512
    assert auto_batch_size(large, (32, 32, 3), memory=2**20) == 1
    flexible = keras.Sequential(
        [keras.Input((None, None, 3)), layers.Conv2D(512, 3, padding="same")]
    )
    assert auto_batch_size(flexible, (32, 32, 3)) == 128


def test_distances():
    """A linear model: the closed form, nothing for the wrong ones, infinity where nothing is."""
    from keras_emr.attacks import ATTACKS

    rng = np.random.default_rng(0)
    model = keras.Sequential([keras.Input((4, 4, 1)), layers.Flatten(), layers.Dense(3)])
    kernel = rng.normal(size=(16, 3)).astype("float32")
    model.layers[-1].set_weights([kernel, np.zeros(3, "float32")])
    x = rng.uniform(0.4, 0.6, (12, 4, 4, 1)).astype("float32")
    z = x.reshape(12, 16) @ kernel
    y = z.argmax(1)
    y[:3] = (y[:3] + 1) % 3
    found = minimum_distances(model, ATTACKS.get("deepfool")(norm="l2"), x, y)
    assert (found[:3] == 0).all()
    for i in range(3, 12):
        gaps = [
            (z[i, y[i]] - z[i, k]) / np.linalg.norm(kernel[:, y[i]] - kernel[:, k])
            for k in range(3)
            if k != y[i]
        ]
        assert found[i] == pytest.approx(min(gaps), rel=0.03)
        assert found[i] >= min(gaps) - 1e-5
    constant = keras.Sequential([keras.Input((4, 4, 1)), layers.Flatten(), layers.Dense(3)])
    constant.layers[-1].set_weights([np.zeros((16, 3)), np.array([2.0, 0.0, 0.0])])
    fab = ATTACKS.get("fab-t")(steps=2)
    assert np.isinf(minimum_distances(constant, fab, x, np.zeros(12, int))).all()
    with pytest.raises(ke.UserError, match="minimum-norm attack"):
        minimum_distances(model, ke.PGD(0.1), x, y)


@pytest.mark.parametrize("shape", [(4, 8, 8, 1), (4, 6, 6, 3), (4, 6, 6)])
@pytest.mark.parametrize("what", ["attack", "autoattack", "margins"])
def test_images_that_the_model_does_not_take_are_one_line(shape, what):
    model, x, y = network(), np.zeros(shape, "float32"), np.zeros(4, int)
    with pytest.raises(ke.UserError, match="do not fit") as refused:
        if what == "attack":
            ke.evaluate_attack(model, ke.PGD(0.1, steps=1), x, y)
        elif what == "autoattack":
            ke.AutoAttack(0.1).run(model, x, y)
        else:
            ke.effective_margins(model, x, y)
    assert str(shape[1:]) in str(refused.value) and "(6, 6, 1)" in str(refused.value)
    assert "\n" not in str(refused.value)
