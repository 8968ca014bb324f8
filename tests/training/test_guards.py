"""What the classifier refuses or makes visible, and its random streams."""

import keras
import numpy as np
import pytest
from keras import ops

import keras_emr as ke
from keras_emr.sampling import StreamSampler
from tests.builders import images, network

X, Y = images()


def compiled(*arguments, **options):
    robust = ke.RobustClassifier(*arguments, **options)
    robust.compile(keras.optimizers.SGD(0.1))
    return robust


@pytest.mark.parametrize("attack", [ke.FGSM(0.1), ke.BIM(0.1), ke.PGD(0.1, start="none")])
@pytest.mark.parametrize("defense", ["trades", ke.MAIL("trades")])
def test_kl_from_the_clean_image_is_refused(attack, defense):
    """Its gradient there is rounding noise."""
    with pytest.raises(ke.UserError, match=r"gradient of the KL .*Received: .*trades"):
        ke.RobustClassifier(network(), defense, attack=attack)
    other = attack.with_defaults(objective="cross_entropy")
    assert ke.RobustClassifier(network(), defense, attack=other).attack.objective == "cross_entropy"


@pytest.mark.parametrize("wrong", [-1, 3])
def test_a_label_out_of_range_makes_the_loss_nan(wrong):
    y = Y.copy()
    y[5] = wrong
    robust = compiled(network(), "at", attack=ke.PGD(0.1, steps=1))
    assert np.isnan(robust.evaluate(X, y, verbose=0, return_dict=True)["loss"])
    assert np.isfinite(robust.evaluate(X, Y, verbose=0, return_dict=True)["loss"])


def test_draws_of_a_fixed_seed_differ_among_themselves_and_repeat():
    """Restarts and the two draws of an L2 start in validation."""
    one, again = StreamSampler(3), StreamSampler(3)
    first, second = (ops.convert_to_numpy(one.uniform((4, 4))) for _ in range(2))
    assert np.abs(first - second).max() > 0.1
    np.testing.assert_array_equal(first, ops.convert_to_numpy(again.uniform((4, 4))))


def test_restarts_of_the_validation_attack_are_worth_their_cost():
    robust = compiled(
        network(),
        "at",
        attack=ke.PGD(0.1),
        eval_attack=ke.PGD(0.3, steps=1, step_size=0.0, restarts=8),
    )
    robust.fit(X, Y, epochs=3, verbose=0)
    single = compiled(robust.model, "at", attack=ke.PGD(0.1), eval_attack=ke.PGD(0.3, steps=1))
    single.eval_attack.step_size = 0.0
    many, one = (
        r.evaluate(X, Y, batch_size=48, verbose=0, return_dict=True)["loss"]
        for r in (robust, single)
    )
    assert many > one + 1e-3


def test_attack_and_regularizer_draw_from_different_streams():
    robust = compiled(network(), "at", attack=ke.PGD(0.1), seed=11)
    drawn = [
        ops.convert_to_numpy(StreamSampler(seed).uniform((64,)))
        for seed in (robust.attack_seed, robust.regularizer_seed)
    ]
    assert abs(np.corrcoef(*drawn)[0, 1]) < 0.5


def test_penalties_of_layers_count_once():
    """Weight penalties once however many passes there are; activity penalties as their mean."""

    def model(activity, weight):
        keras.utils.set_random_seed(0)
        dense = keras.layers.Dense(
            3,
            activity_regularizer=keras.regularizers.L1(activity),
            kernel_regularizer=keras.regularizers.L2(weight),
        )
        return keras.Sequential([keras.Input((6, 6, 1)), keras.layers.Flatten(), dense])

    def loss(defense, *penalties):
        robust = compiled(
            model(*penalties),
            defense,
            attack=ke.PGD(0.0, steps=1, start="none", objective="cross_entropy"),
        )
        return robust.evaluate(X, Y, batch_size=48, verbose=0, return_dict=True)["loss"]

    plain = model(0.0, 0.0)
    weights = ops.convert_to_numpy(plain.layers[-1].kernel.value)
    logits = plain.predict(X, verbose=0)
    # Keras divides an activity penalty by the batch size.
    expected = 0.5 * np.abs(logits).sum() / len(X) + 0.3 * np.square(weights).sum()
    for defense in ("standard", "at", "trades"):
        extra = loss(defense, 0.5, 0.3) - loss(defense, 0.0, 0.0)
        assert extra == pytest.approx(expected, rel=1e-4)


def test_fit_leaves_the_users_random_stream_alone():
    if keras.backend.backend() != "torch":
        pytest.skip("no hidden random state")
    import torch

    robust = compiled(network(dropout=0.5), "standard")
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    robust.fit(X, Y, verbose=0)
    np.testing.assert_array_equal(torch.rand(3), expected)


def test_train_on_batch_counts_as_the_first_epoch():
    """Outside `fit` nobody sets the epoch: a warm-up must not be stuck before its beginning."""
    from keras_emr.regularizers.schedules import WarmUp

    emr = ke.EffectiveMarginRegularizer(1.0, schedule=WarmUp(1))
    losses = [
        compiled(network(), "standard", regularizers=r).train_on_batch(X, Y, return_dict=True)
        for r in ([emr], [ke.EffectiveMarginRegularizer(1.0)])
    ]
    assert losses[0]["loss"] == pytest.approx(losses[1]["loss"], rel=1e-6)


@pytest.mark.parametrize("attack", ["pgd", "lstm", "generator-gradient"])
def test_a_subclassed_model_need_not_be_built(attack):
    class Flat(keras.Model):
        def __init__(self):
            super().__init__()
            self.flatten, self.dense = keras.layers.Flatten(), keras.layers.Dense(3)

        def call(self, x, training=None):
            return self.dense(self.flatten(x))

    learned = attack != "pgd"
    steps = {} if attack == "generator-gradient" else {"steps": 2}
    options = ke.LearnedAttack.named(attack, 0.1, **steps) if learned else ke.PGD(0.1, steps=2)
    robust = compiled(Flat(), "at", attack=options)
    history = robust.fit(X, Y, verbose=0, validation_data=(X, Y)).history
    assert np.isfinite(history["val_loss"][0]) and robust.model.count_params() == 36 * 3 + 3
