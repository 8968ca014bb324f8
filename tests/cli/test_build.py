"""Settings become what they say."""

import numpy as np
import pytest

from keras_emr_cli.settings import merge
from keras_emr_cli.train_settings import TRAIN, mail_burn_in
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
