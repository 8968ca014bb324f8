"""Accounting of attack evaluations."""

import keras
import numpy as np
import pytest

import keras_emr as ke
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


def test_batches_are_padded_and_their_padding_dropped():
    sizes = []

    def double(a):
        sizes.append(tuple(a.shape))
        return (a * 2,)

    (out,) = in_batches(double, 4, np.arange(10.0))
    assert out.tolist() == [2.0 * i for i in range(10)] and set(sizes) == {(4,)}


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
