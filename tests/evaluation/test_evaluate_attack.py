"""Accounting of attack evaluations."""

import keras
import numpy as np
import pytest

import keras_emr as ke
from keras_emr import backend
from keras_emr.evaluation.batching import in_batches
from keras_emr.evaluation.robust_accuracy import InfeasibleAttack
from keras_emr.evaluation.scorecard import scorecard
from tests.builders import images, network

X, Y = images(70)


@pytest.fixture(scope="module")
def model():
    trained = network(batch_norm=False)
    trained.compile(
        keras.optimizers.Adam(1e-2),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    trained.fit(X, Y, epochs=20, verbose=0)
    return trained


def predictions(model, x):
    return keras.ops.convert_to_numpy(model(x)).argmax(1)


def test_every_flag_is_what_the_model_says(model):
    labels = Y.copy()
    labels[:7] = (labels[:7] + 1) % 3  # wrong to begin with
    attack = ke.PGD(0.12, steps=4, restarts=2)
    result = ke.evaluate_attack(model, attack, X, labels, batch_size=16)
    np.testing.assert_array_equal(result.correct, predictions(model, X) == labels)
    np.testing.assert_array_equal(result.robust, predictions(model, result.x_adv) == labels)
    assert not result.robust[:7].any()
    np.testing.assert_array_equal(result.x_adv[:7], X[:7])  # never attacked
    assert result.robust_accuracy == result.robust.sum() / 70
    assert 0 < result.robust.sum() < result.correct.sum() < 70
    assert result.max_perturbation == pytest.approx(0.12, abs=1e-6)


def test_an_attack_outside_its_ball_is_an_error_not_a_result(model):
    class TooFar(ke.PGD):
        def step(self, objective, x, state):
            return (state[0] + 0.02,)

    with pytest.raises(InfeasibleAttack, match="left its threat model"):
        ke.evaluate_attack(model, TooFar(0.05, steps=5, start="none"), 0.5 * X, Y)

    class Broken(ke.PGD):
        def step(self, objective, x, state):
            return (state[0] * float("nan"),)

    with pytest.raises(InfeasibleAttack, match="NaN"):
        ke.evaluate_attack(model, Broken(0.05, steps=1), X, Y)


def test_progress_ends_at_its_total(model):
    seen = []
    attack = ke.PGD(0.05, steps=3, restarts=2)
    ke.evaluate_attack(model, attack, X, Y, batch_size=32, progress=lambda *a: seen.append(a))
    assert seen[-1][0] == seen[-1][1] and [done for done, _ in seen] == sorted(d for d, _ in seen)


def test_softmax_and_emptiness_are_refused(model):
    probabilities = keras.Sequential([*model.layers, keras.layers.Softmax()])
    with pytest.raises(ke.UserError, match="must end in logits"):
        ke.evaluate_attack(probabilities, ke.FGSM(0.1), X, Y)
    with pytest.raises(ke.UserError, match="nothing to attack"):
        ke.evaluate_attack(model, ke.FGSM(0.1), X[:0], Y[:0])


class Subclassed(keras.Model):
    """Logits from ``out``; a sigmoid gate is what was assigned last."""

    def __init__(self, squash=False):
        super().__init__()
        self.squash = squash
        self.flat = keras.layers.Flatten()
        self.out = keras.layers.Dense(3)
        self.gate = keras.layers.Dense(3, activation="sigmoid")

    def call(self, x):
        flat = self.flat(x)
        logits = self.out(flat) * self.gate(flat)
        return keras.ops.softmax(logits) if self.squash else logits


def test_subclassed_models_are_judged_by_their_numbers():
    for make_built in (False, True):
        squashed, plain = Subclassed(squash=True), Subclassed()
        if make_built:
            squashed(X[:1]), plain(X[:1])
        with pytest.raises(ke.UserError, match="sum to 1"):
            ke.evaluate_attack(squashed, ke.FGSM(0.1), X, Y)
        result = ke.evaluate_attack(plain, ke.PGD(0.1, steps=2, start="odi"), X, Y)
        np.testing.assert_array_equal(result.correct, predictions(plain, X) == Y)


def changed(array, value, dtype=None):
    array = array.astype(dtype or array.dtype)
    array[3] = value
    return array


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        (changed(X, 1.5), Y, r"x: .*\[0, 1\]\. Received: min=.*, max=1\.5"),
        (changed(X, -0.25), Y, r"x: .*\[0, 1\]\. Received: min=-0\.25"),
        (255 * X, Y, "Divide by 255 first"),
        ((255 * X).astype("uint8"), Y, "Divide by 255 first"),
        (changed(X, np.nan), Y, "x: .*finite.*Received: 36 NaN"),
        (changed(X, np.inf), Y, "x: .*finite.*Received: .* 36 Inf"),
        (X, changed(Y, 3), r"y: .*Received: label 3, with K=3 classes in the model"),
        (X, changed(Y, -1), "y: .*Received: label -1"),
        (X, changed(Y, 1.5, "float32"), "y: .*integers.*Received: dtype float32"),
        (X, np.eye(3, dtype="int32")[Y], "y: .*one-dimensional.*Received: shape"),
    ],
    ids=["high", "low", "x255", "uint8", "nan", "inf", "K", "negative", "fraction", "one-hot"],
)
def test_what_cannot_be_attacked_is_said_in_one_line(model, x, y, message):
    with pytest.raises(ke.UserError, match=message) as caught:
        ke.evaluate_attack(model, ke.PGD(0.1, steps=1), x, y)
    assert "\n" not in str(caught.value)


def test_a_model_that_gives_nan_is_not_an_attack_that_fails():
    broken = network(batch_norm=False)
    bias = broken.layers[-1].bias
    bias.assign([0.0, float("nan"), 0.0])
    with pytest.raises(ke.UserError, match=r"not finite\. Received: NaN or Inf for 70 of 70"):
        ke.evaluate_attack(broken, ke.PGD(0.1, steps=1), X, Y, batch_size=32)
    bias.assign([0.0, float("inf"), 0.0])
    with pytest.raises(ke.UserError, match=r"not finite\. Received: NaN or Inf for 70 of 70"):
        ke.evaluate_attack(broken, ke.PGD(0.1, steps=1), X, Y, batch_size=32)


def test_batches_are_padded_and_their_padding_dropped():
    sizes = []

    def double(a):
        sizes.append(tuple(a.shape))
        return (a * 2,)

    (out,) = in_batches(double, 4, np.arange(10.0))
    assert out.tolist() == [2.0 * i for i in range(10)]
    assert sizes == [(4,), (4,), (4,) if backend.SHAPES_COMPILED else (2,)]


def test_scorecard_states_everything_that_made_the_number(model):
    card = scorecard(model, ke.PGD(0.1, steps=4), X, Y, seed=3)
    assert card["attack"] == {
        "name": "pgd",
        "epsilon": 0.1,
        "norm": "linf",
        "steps": 4,
        "step_size": pytest.approx(0.0625),
        "start": "uniform",
        "restarts": 1,
        "objective": "cross_entropy",
        "box_first": None,
        "noise_at_zero": None,
        "eot": 1,
    }
    assert (card["seed"], card["n"], card["bn_mode"]) == (3, 70, "inference")
    result = ke.evaluate_attack(model, ke.PGD(0.1, steps=4), X, Y, seed=3)
    assert card["robust_accuracy"] == result.robust_accuracy
    margins = ke.effective_margins(model, X, Y)
    assert card["margins"]["share_above_epsilon"] == (margins.linf > 0.1).mean()
    counts = card["margins"]["histogram_l2"]["counts"]
    assert sum(counts) == 70 and len(counts) == 20


def test_margin_is_negative_exactly_where_the_model_is_wrong(model):
    labels = Y.copy()
    labels[:7] = (labels[:7] + 1) % 3
    margins = ke.effective_margins(model, X, labels)
    np.testing.assert_array_equal(margins.l2 > 0, predictions(model, X) == labels)
