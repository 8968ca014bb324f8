"""A ResNet in bfloat16: attack, loss and average in float32, weights that learn."""

import keras
import numpy as np
import pytest

import keras_emr as ke
from keras_emr.models.wide_resnet import wide_resnet
from keras_emr.network import Network
from keras_emr.training.averaging import EMA
from keras_emr.training.optimizers import SGD
from keras_emr.training.weight_perturbation import AWP
from tests.builders import images


@pytest.fixture
def bfloat16():
    keras.config.set_dtype_policy("mixed_bfloat16")
    yield
    keras.config.set_dtype_policy("float32")


@pytest.mark.slow
def test_a_small_resnet_learns_in_bfloat16(bfloat16):
    keras.utils.set_random_seed(0)
    x, y = images(24, side=8)
    model = wide_resnet((8, 8, 1), 3, depth=10, widen=1)
    robust = ke.RobustClassifier(
        model,
        "at",
        attack=ke.FGSM(0.05, objective="cross_entropy"),
        regularizers=[ke.EffectiveMarginRegularizer(0.001)],
        averaging=EMA(0.9),
        weight_perturbation=AWP(0.001),
    )
    robust.compile(SGD(0.02, weight_decay=1e-4))
    history = robust.fit(x, y, batch_size=12, epochs=6, shuffle=False, verbose=0).history
    assert np.isfinite(history["loss"]).all()
    assert history["loss"][-1] < 0.9 * history["loss"][0]
    assert "bfloat16" in str(model(x).dtype)
    assert {keras.backend.standardize_dtype(w.dtype) for w in model.weights} == {"float32"}
    # What the attack sees is the float32 network: its logits are not rounded to 8 bits.
    seen = keras.ops.convert_to_numpy(Network(model).frozen()(keras.ops.convert_to_tensor(x)))
    rounded = keras.ops.convert_to_numpy(
        keras.ops.cast(keras.ops.cast(seen, "bfloat16"), "float32")
    )
    assert seen.dtype == np.float32 and (seen != rounded).mean() > 0.5
    low = keras.ops.convert_to_numpy(keras.ops.cast(model(x), "float32"))
    np.testing.assert_allclose(low, seen, atol=0.05 * np.abs(seen).max())
