"""Settings become what they say."""

import numpy as np
import pytest

from keras_emr_cli.defense_settings import mail_burn_in
from keras_emr_cli.settings import merge
from keras_emr_cli.train_settings import TRAIN
from tests.cli.harness import call

pytestmark = pytest.mark.usefixtures("warm_keras")


def settings(**flags):
    return merge(TRAIN, flags, environment={})


@pytest.mark.parametrize("name", ["adam", "sgd"])
def test_weight_decay_takes_every_weight_with_it(capfd, name):
    """With no gradient a weight shrinks by rate x decay at first, a bias too; as help says."""
    import keras

    from keras_emr_cli.build import optimizer

    text = " ".join(call(capfd, "train", "--help").out.split())
    assert "Decay every weight, as the published recipes do, or spare biases and BatchNorm." in text
    layers = [keras.layers.Dense(3), keras.layers.BatchNormalization()]
    model = keras.Sequential([keras.Input((2,)), *layers])
    for variable in model.trainable_variables:
        variable.assign(np.full(variable.shape, 2.0))
    chosen = optimizer(settings(optimizer=name, learning_rate="0.5", weight_decay="0.1"), 7)
    zeros = [keras.ops.zeros(v.shape) for v in model.trainable_variables]
    chosen.apply(zeros, model.trainable_variables)
    assert len(zeros) == 4  # kernel, bias, gamma, beta
    for variable in model.trainable_variables:
        np.testing.assert_allclose(keras.ops.convert_to_numpy(variable), 2.0 * 0.95, rtol=1e-6)


@pytest.mark.parametrize(("name", "rate"), [("adam", 0.001), ("sgd", 0.1)])
def test_an_optimizer_has_a_learning_rate_of_its_own(name, rate):
    """With Adam's 0.001, SGD stays at 10 % on the digits for epochs."""
    from keras_emr_cli.build import optimizer

    assert float(optimizer(settings(optimizer=name), 7).learning_rate) == pytest.approx(rate)
    chosen = optimizer(settings(optimizer=name, learning_rate="0.01"), 7)
    assert float(chosen.learning_rate) == pytest.approx(0.01)


@pytest.mark.parametrize(
    ("epochs", "given", "burn_in"),
    [("120", None, 76), ("20", None, 13), ("1", None, 1), ("20", "0", 0), ("20", "4", 4)],
)
def test_burn_in_of_mail(epochs, given, burn_in):
    from keras_emr_cli.build import defense

    chosen = settings(epochs=epochs, mail_burn_in=given, defense="mail-at")
    assert mail_burn_in(chosen) == defense(chosen).burn_in == burn_in


def test_a_preset_decides_its_options():
    from keras_emr_cli.build import regularizers

    (emr,) = regularizers(settings(emr_preset="at-emr-released", emr_center="true"))
    assert (emr.weight, emr.temperature, emr.reduction) == (3.0, 40.0, "released")
    assert emr.schedule is not None and emr.center


def built(**flags):
    """The classifier of a run on 54 images of 8x8x1 and 2 classes, 3 steps an epoch."""
    from keras_emr.data.dataset import from_arrays
    from keras_emr_cli.build import classifier
    from tests.cli.harness import arrays

    flags = {"model": "mlp", "batch_size": "16", "emr": "0", **flags}
    return classifier(settings(**flags), from_arrays(arrays(), validation=0.1))


def test_training_extras_reach_the_classifier():
    from keras_emr.training.averaging import EMA, SWA

    robust = built(averaging="ema", averaging_decay="0.9", awp="0.02", awp_warmup="3")
    assert isinstance(robust.averaging, EMA) and robust.averaging.decay == 0.9
    assert robust.averaging.statistics == "copy"
    assert (robust.weight_perturbation.gamma, robust.weight_perturbation.warmup) == (0.02, 3)
    assert robust.epsilon_schedule is None
    robust = built(averaging="swa", epochs="8", epsilon_warmup="4", clip_norm="2")
    assert isinstance(robust.averaging, SWA)
    # Epochs 7 and 8 of 8, at the end of each: 54 // 16 steps.
    assert (robust.averaging.start, robust.averaging.every) == (7, 3)
    assert robust.averaging.statistics == "average"
    assert robust.epsilon_schedule.epochs == 4 and robust.weight_perturbation is None
    assert robust.optimizer.global_clipnorm == 2.0


def test_standard_training_has_no_use_for_what_is_adversarial():
    robust = built(defense="standard", awp="0.02", epsilon_warmup="4")
    assert robust.weight_perturbation is None and robust.epsilon_schedule is None


def test_fast_fgsm_is_one_long_step_from_noise():
    attack = built(attack="fast-fgsm", defense="at", epsilon="8/255").training_attack
    facts = (attack.name, attack.steps, attack.start, attack.restarts)
    assert facts == ("pgd", 1, "uniform", 1)
    assert attack.alpha == pytest.approx(10 / 255) and attack.epsilon == 8 / 255
    shorter = built(attack="fast-fgsm", defense="at", step_size="0.01").training_attack
    assert shorter.alpha == 0.01


@pytest.mark.parametrize(
    ("flags", "guard"),
    [
        ({"attack": "fast-fgsm"}, 0.2),
        ({"attack": "fgsm"}, 0.2),
        ({"attack": "pgd"}, None),
        ({"attack": "pgd", "overfitting_guard": "0.3"}, 0.3),
        ({"attack": "fgsm", "overfitting_guard": "1"}, None),
    ],
)
def test_the_guard_is_on_for_single_steps(flags, guard):
    from keras_emr_cli.build import overfitting_guard

    assert overfitting_guard(settings(**flags)) == guard


def test_label_smoothing_reaches_the_defense():
    for name in ("standard", "at", "trades", "mail-at"):
        assert built(defense=name, label_smoothing="0.1").defense.label_smoothing == 0.1


def test_normalization_by_the_data():
    import keras

    from tests.cli.harness import arrays

    robust = built(normalization="data", activation="tanh")
    layer = robust.model.layers[0]
    assert robust.model.layers[2].activation.__name__ == "tanh"
    x = arrays()["x_train"]
    normalized = keras.ops.convert_to_numpy(layer(x))
    assert normalized.mean() == pytest.approx(0, abs=0.05)
    assert normalized.std() == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize(
    ("flags", "warmup"),
    [({}, 4), ({"epochs": "200"}, 10), ({"defense": "at"}, 0), ({"awp_warmup": "0"}, 0)],
)
def test_awp_waits_until_something_is_learned(flags, warmup):
    """From the first step on it kept TRADES at 10 % on augmented digits."""
    robust = built(awp="0.005", **{"epochs": "20", **flags})
    assert robust.weight_perturbation.warmup == warmup


def test_mma_has_its_own_margin_and_numbers_its_examples():
    robust = built(defense="mma", epsilon="0.1", steps="4")
    assert robust.attack.epsilon == pytest.approx(0.15) and robust.attack.steps == 4
    assert robust.attack.objective == "soft_margin" and robust.eval_attack.epsilon == 0.1
    defense = robust.defense
    assert (defense.clean_weight, defense.smallest, defense.trials) == (1 / 3, None, 10)
    assert robust.remembered.shape == (54,)
    flags = {"mma_margin": "20/255", "mma_smallest": "0.005", "clean_weight": "0"}
    robust = built(defense="mma", **flags)
    assert robust.attack.epsilon == 20 / 255
    assert (robust.defense.clean_weight, robust.defense.smallest) == (0.0, 0.005)


def test_lbgat_has_a_teacher_beside_the_network():
    robust = built(defense="lbgat", model="mlp", teacher="small-cnn")
    assert (robust.teacher.name, robust.model.name, robust.defense.beta) == ("small_cnn", "mlp", 0)
    assert built(defense="lbgat", beta="6").defense.beta == 6


def test_free_at_counts_its_replays_as_steps():
    from keras_emr_cli.build import steps_per_epoch
    from tests.cli.harness import arrays

    robust = built(defense="free-at", replays="4", lr_schedule="cosine", epochs="2")
    assert robust.defense.replays == 4 and robust.perturbation.shape == (16, 8, 8, 1)
    assert robust.optimizer._learning_rate.steps_per_epoch == 3 * 4
    # Extra data take places in a batch, so that the data's own last longer: 54 // 11.
    from keras_emr.data.dataset import from_arrays

    data = from_arrays(arrays(), validation=0.1)
    assert steps_per_epoch(settings(batch_size="16", extra_data="e.npz"), data) == 4


@pytest.mark.parametrize(
    ("flags", "margin"),
    [({}, 3.0), ({"angular_margin": "0.1", "head_scale": "20"}, 2.0), ({"angular_margin": "0"}, 0)],
)
def test_a_hypersphere_head_brings_its_margin(flags, margin):
    for name in ("trades", "free-at"):
        robust = built(defense=name, head="hypersphere", **flags)
        assert robust.defense.logit_margin == pytest.approx(margin)
    assert robust.model.layers[-1].scale == float(flags.get("head_scale", 15))
    assert built(defense="mail-at", head="hypersphere").model.layers[-2].name == "cosines"


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"defense": "mart", "mixup": "1"}, "loss is not defined. Received: defense='mart'"),
        ({"cutmix": "1", "attack_objective": "margin"}, "objective is not defined"),
        ({"cutmix": "1", "head": "hypersphere"}, "loss is not defined"),
        ({"defense": "mma", "attack": "apgd"}, "attack: defense mma has its own"),
        ({"defense": "free-at", "attack": "fgsm"}, "attack: defense free-at has its own"),
        ({"defense": "lbgat", "angular_margin": "0.1"}, "angular_margin: the loss of lbgat has"),
        ({"defense": "lbgat", "awp": "0.1"}, "AWP is not defined for defense 'lbgat'"),
        ({"defense": "mma", "label_smoothing": "0.1"}, "label_smoothing: the loss of mma has no"),
    ],
)
def test_what_does_not_go_together(flags, said):
    from keras_emr.errors import UserError

    with pytest.raises(UserError, match=said):
        built(**flags)
