"""Saving and loading the wrapper, exactly."""

import keras
import numpy as np

import keras_emr as ke
from tests.builders import assert_same, images, network, snapshot

X, Y = images()


def trained(model=None, defense=None):
    keras.utils.set_random_seed(3)
    robust = ke.RobustClassifier(
        model or network(dropout=0.3),
        defense or ke.MAIL("trades", burn_in=1, normalization="batch"),
        attack=ke.PGD(0.1, steps=2),
        regularizers=[
            ke.EffectiveMarginRegularizer.preset("at-emr-released", weighting="rademacher")
        ],
        eval_attack=ke.FGSM(0.2),
        seed=11,
    )
    robust.compile(keras.optimizers.Adam(1e-2))
    robust.fit(X, Y, batch_size=16, epochs=2, shuffle=False, verbose=0)
    return robust


def test_a_loaded_classifier_continues_bit_for_bit(tmp_path):
    robust = trained()
    robust.save(tmp_path / "c.keras")
    loaded = keras.models.load_model(tmp_path / "c.keras")
    np.testing.assert_array_equal(robust.predict(X, verbose=0), loaded.predict(X, verbose=0))
    assert repr(loaded.defense) == repr(robust.defense)
    assert repr(loaded.attack) == repr(robust.attack)
    assert repr(loaded.eval_attack) == repr(robust.eval_attack)
    histories = [
        model.fit(X, Y, batch_size=16, initial_epoch=2, epochs=4, shuffle=False, verbose=0).history
        for model in (robust, loaded)
    ]
    assert histories[0] == histories[1]
    assert_same(snapshot(robust.weights), snapshot(loaded.weights))
    assert_same(snapshot(robust.optimizer.variables), snapshot(loaded.optimizer.variables))


def test_saved_weights_reload(tmp_path):
    robust = trained()
    robust.save_weights(tmp_path / "c.weights.h5")
    other = trained(network(dropout=0.3, seed=9))
    other.load_weights(tmp_path / "c.weights.h5")
    assert_same(snapshot(robust.weights), snapshot(other.weights))
