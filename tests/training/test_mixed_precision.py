"""A ResNet in bfloat16: attack, loss and average in float32, weights that learn. And the reverse:
only the attack in bfloat16."""

import keras
import numpy as np
import pytest

import keras_emr as ke
from keras_emr.attacks.base import Objective
from keras_emr.models.wide_resnet import wide_resnet
from keras_emr.network import Network, layers_of
from keras_emr.network.substitution import cast_at_use, changed
from keras_emr.training.averaging import EMA
from keras_emr.training.optimizers import SGD
from keras_emr.training.weight_perturbation import AWP
from tests.builders import images, network


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


def watched(model, seen):
    """Note the precision of every pass of ``model``: (training, that of its layers)."""
    call = type(model).call

    def noting(x, training=None, **options):
        seen.append((training, {layer.compute_dtype for layer in model.layers}))
        return call(model, x, training=training, **options)

    return changed([(model, "call", noting)])


def classifier(**options):
    attack = ke.PGD(0.1, steps=2)
    robust = ke.RobustClassifier(network(), "at", attack, attack_precision="bfloat16", **options)
    robust.compile(keras.optimizers.SGD(0.1))
    return robust


def test_signs_of_a_gradient_in_bfloat16_are_mostly_those_in_float32():
    x, y = (keras.ops.convert_to_tensor(a) for a in images(24))
    found = {}
    for compute in ("float32", "bfloat16"):
        logits = Network(network()).frozen(compute=compute)
        value, gradient = Objective(logits, "cross_entropy", x, y).value_and_gradient(x)
        assert [keras.backend.standardize_dtype(t.dtype) for t in (value, gradient)] == 2 * [
            "float32"
        ]
        found[compute] = keras.ops.convert_to_numpy(gradient)
    wide, low = found["float32"], found["bfloat16"]
    share = (np.sign(wide) == np.sign(low)).mean()
    assert 0.95 < share and (wide != low).mean() > 0.5, share
    assert np.corrcoef(low.ravel(), wide.ravel())[0, 1] > 0.99


def test_only_the_attack_of_a_training_step_and_what_it_shows_are_in_bfloat16():
    x, y = images(8)
    seen, robust = [], classifier(regularizers=[ke.EffectiveMarginRegularizer(0.1)])
    # Eagerly each pass is seen; compiled all at once.
    robust.compile(keras.optimizers.SGD(0.1), run_eagerly=keras.backend.backend() != "jax")
    with watched(robust.model, seen):
        logs = robust.train_on_batch(x, y, return_dict=True)
        trained, seen[:] = list(seen), []
        robust.test_on_batch(x, y)
    # Two steps, and the clean accuracy, of the network as the attack sees it.
    assert [kind for kind, of in trained if of == {"bfloat16"}] == 3 * [False]
    others = [kind for kind, of in trained if of != {"bfloat16"}]
    assert others.count(True) == 1 and others.count(False) == 1  # EMR
    assert all(of == {"float32"} for _, of in trained if of != {"bfloat16"})
    assert len(seen) >= 4 and all(of == {"float32"} for _, of in seen)  # validation, attack too
    assert np.isfinite(logs["loss"]) and logs["emr"] > 0
    weights = [w for w in robust.model.weights if "seed" not in w.name]
    assert {keras.backend.standardize_dtype(w.dtype) for w in weights} == {"float32"}
    assert {layer.compute_dtype for layer in robust.model.layers} == {"float32"}


def test_a_step_attacked_in_bfloat16_is_nearly_the_same():
    x, y = images(24)
    losses = []
    for precision in ("float32", "bfloat16"):
        robust = classifier()
        robust.attack_precision = precision
        losses.append(robust.train_on_batch(x, y, return_dict=True)["loss"])
    assert 0 < abs(losses[0] - losses[1]) < 0.02 * losses[0], losses


def test_the_attacks_precision_is_saved(tmp_path):
    robust = classifier()
    robust.save(tmp_path / "robust.keras")
    assert keras.saving.load_model(tmp_path / "robust.keras").attack_precision == "bfloat16"


def test_an_unknown_precision_of_the_attack():
    with pytest.raises(ke.UserError, match=r"attack_precision.*'float16'.*float32, bfloat16"):
        ke.RobustClassifier(network(), "at", ke.PGD(0.1), attack_precision="float16")


class Exact(keras.layers.Layer):
    """Has a weight, and wants its float32."""

    def __init__(self):
        super().__init__(autocast=False)
        self.shift = self.add_weight(shape=(), initializer="ones")

    def call(self, x):
        assert keras.backend.standardize_dtype(self.shift.value.dtype) == "float32"
        return x + keras.ops.cast(self.shift, x.dtype)


def test_weights_that_an_attack_in_bfloat16_would_cast_at_each_step_are_cast_ahead(monkeypatch):
    stack = [keras.Input((6, 6, 1)), keras.layers.Conv2D(4, 3), keras.layers.BatchNormalization()]
    model = keras.Sequential([*stack, Exact(), keras.layers.Flatten(), keras.layers.Dense(3)])
    layers = layers_of(model)
    cast = cast_at_use(layers, "bfloat16")
    names = [v.path.split("/")[-1] for v in model.variables if id(v) in cast]
    assert names == ["kernel", "bias"] * 2  # BatchNorm keeps its own in float32
    assert cast_at_use(layers, "float32") == set()

    x = keras.ops.convert_to_tensor(images(8)[0])
    ahead = Network(model).frozen(compute="bfloat16")(x)
    dense, used = model.layers[-1], []
    call = dense.call
    object.__setattr__(dense, "call", lambda x, **o: used.append(dense.kernel.value) or call(x))
    frozen = Network(model).frozen(compute="bfloat16")
    for _ in range(2):
        frozen(x)
    assert used[0] is used[1]  # a cast would make another
    monkeypatch.setattr("keras_emr.network.passes.cast_at_use", lambda layers, name: set())
    at_use = Network(model).frozen(compute="bfloat16")(x)
    assert used[2] is not used[1]
    numbers = [
        keras.ops.convert_to_numpy(keras.ops.cast(t, "float32"))
        for t in (ahead, at_use, Network(model).frozen()(x))
    ]
    np.testing.assert_array_equal(numbers[0], numbers[1])
    assert (numbers[0] != numbers[2]).any()
