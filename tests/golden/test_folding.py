"""BatchNorm taken into the convolution before it: the model's own numbers, for constant weights."""

import keras
import numpy as np
import pytest
from keras import layers, ops

from keras_emr import backend
from keras_emr.network import Network
from keras_emr.network.folding import normalized
from tests.builders import images

SHAPE = (6, 6, 1)


def conv(name, **options):
    return layers.Conv2D(4, 3, padding="same", name=name, **options)


def norm(name, **options):
    return layers.BatchNormalization(name=name, epsilon=0.01, **options)


def chain():
    entry = keras.Input(SHAPE)
    x = norm("n1")(conv("c1", use_bias=False, strides=2)(entry))
    x = norm("n2", scale=False)(conv("c2")(layers.ReLU()(x)))
    x = norm("n3", center=False, axis=3)(layers.Conv2D(4, 1, name="c3")(layers.ReLU()(x)))
    return entry, x


def residual():
    entry = keras.Input(SHAPE)
    start = conv("c1")(entry)  # read twice
    x = norm("n2")(conv("c2")(layers.ReLU()(norm("n1")(start))))
    return entry, layers.Add()([start, x])


def kept():
    """Nothing to fold: an activation between, a convolution used twice, groups, a depthwise one."""
    entry = keras.Input(SHAPE)
    x = norm("n1")(conv("c1", activation="relu")(entry))
    again = conv("c2")
    x = norm("n2")(again(x))
    x = norm("n3")(again(x))
    x = norm("n4")(conv("c4", groups=2)(x))
    return entry, norm("n5")(layers.DepthwiseConv2D(3, name="c5")(x))


def nested():
    inner = keras.Sequential([keras.Input((6, 6, 4)), conv("c2"), norm("n2"), layers.ReLU()])
    outer = keras.Input((6, 6, 4))
    block = keras.Model(outer, norm("n3")(conv("c3")(inner(outer))))
    entry = keras.Input(SHAPE)
    return entry, block(block(norm("n1")(conv("c1")(entry))))  # a whole model may come twice


def between():
    """What a convolution makes is an output of the model inside."""
    entry = keras.Input(SHAPE)
    x = conv("c1")(entry)
    inner = keras.Model(entry, [norm("n1")(x), x])
    first = keras.Input(SHAPE)
    return first, layers.Add()(inner(first))


CASES = {
    chain: {"c1": "n1", "c2": "n2", "c3": "n3"},
    residual: {"c2": "n2"},
    kept: {},
    nested: {"c1": "n1", "c2": "n2", "c3": "n3"},
    between: {},
}
case = pytest.mark.parametrize("make", CASES, ids=lambda make: make.__name__)


def trained(make):
    """A classifier whose every weight and statistic is far from where it starts."""
    entry, x = make()
    model = keras.Model(entry, layers.Dense(3, name="head")(layers.Flatten()(x)))
    rng = np.random.default_rng(0)
    for variable in model.variables:
        if variable.dtype == "float32":
            variable.assign(rng.uniform(0.2, 1.0, variable.shape) * rng.choice([1, 1, 1.5]))
    return model


def logits_and_gradient(fn, x):
    direction = ops.convert_to_tensor(np.random.default_rng(1).normal(size=(len(x), 3)), "float32")
    logits, _, gradient = backend.value_and_grad(
        lambda x: (ops.sum(ops.cast(fn(x), "float32") * direction, axis=-1), ()),
        ops.convert_to_tensor(x),
    )
    return ops.convert_to_numpy(logits), ops.convert_to_numpy(gradient)


@case
def test_pairs(make):
    pairs = normalized(trained(make))
    assert {a.name: b.name for a, b in pairs} == CASES[make] and len(pairs) == len(CASES[make])


@case
@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
def test_a_folded_pass_is_the_models_own(make, compute):
    model, x = trained(make), images(4)[0]
    want = logits_and_gradient(lambda x: model(x, training=False), x)
    got = logits_and_gradient(Network(model).frozen(compute=compute), x)
    for value, wanted in zip(got, want, strict=True):
        tolerance = {"float32": 1e-5, "bfloat16": 0.1}[compute]
        np.testing.assert_allclose(value, wanted, atol=tolerance * np.abs(wanted).max())
    # The model is as it was.
    assert not any("call" in vars(layer) for layer in model._flatten_layers())
    again = logits_and_gradient(lambda x: model(x, training=False), x)
    np.testing.assert_array_equal(again[0], want[0])


def test_no_normalization_is_left_in_an_attack_and_all_are_in_training(monkeypatch):
    monkeypatch.setattr(backend, "cheaper", lambda twice: {})  # the layers run by their own calls
    model, x = trained(chain), ops.convert_to_tensor(images(4)[0])
    calls, call = [], layers.BatchNormalization.call
    monkeypatch.setattr(
        layers.BatchNormalization,
        "call",
        lambda self, *a, **k: calls.append(self.name) or call(self, *a, **k),
    )
    Network(model).frozen()(x)
    assert calls == []
    in_training = Network(model).frozen(training=True)(x)
    assert calls == ["n1", "n2", "n3"]
    np.testing.assert_allclose(
        ops.convert_to_numpy(in_training), ops.convert_to_numpy(model(x, training=True)), rtol=1e-5
    )


def test_a_model_that_runs_otherwise_than_its_graph_is_left_alone():
    class Otherwise(keras.Model):
        def call(self, inputs, training=None):
            return self.get_layer("c1")(inputs)

    entry, x = chain()
    assert normalized(Otherwise(entry, x)) == []
    assert len(normalized(keras.Model(entry, x))) == 3

    class Subclassed(keras.Model):
        def __init__(self):
            super().__init__()
            self.inner = keras.Model(entry, x)

        def call(self, inputs):
            return self.inner.get_layer("c1")(inputs)

    assert normalized(Subclassed()) == []


def test_weights_are_those_of_the_moment():
    model, x = trained(chain), ops.convert_to_tensor(images(4)[0])
    network = Network(model)
    before = network.frozen()
    value = ops.convert_to_numpy(before(x))
    model.get_layer("n2").moving_mean.assign([0.5, -0.5, 1.0, 2.0])
    np.testing.assert_array_equal(ops.convert_to_numpy(before(x)), value)
    after = ops.convert_to_numpy(network.frozen()(x))
    assert np.abs(after - value).max() > 0.01
    np.testing.assert_allclose(
        after, ops.convert_to_numpy(model(x, training=False)), rtol=1e-4, atol=1e-4
    )
