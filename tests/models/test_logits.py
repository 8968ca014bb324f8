"""Models that end in probabilities are refused, with the fix; models that end in logits are not."""

import random

import keras
import numpy as np
import pytest
from keras import layers

from keras_emr.errors import UserError
from keras_emr.models.logits import require_logits
from keras_emr.network import Network, full_precision

SHAPE = (4, 4, 1)
# Keras draws the seeds of initializers from `random`; set_random_seed would import TensorFlow.


def sequential(*last):
    return keras.Sequential([keras.Input(SHAPE), layers.Flatten(), *last])


def functional(end):
    x = keras.Input(SHAPE)
    return keras.Model(x, end(layers.Dense(3)(layers.Flatten()(x))))


@keras.saving.register_keras_serializable("tests")
class Subclassed(keras.Model):
    def __init__(self, activation=None, **kwargs):
        super().__init__(**kwargs)
        self.flat = layers.Flatten()
        self.out = layers.Dense(3, activation=activation)

    def call(self, x):
        return self.out(self.flat(x))


@keras.saving.register_keras_serializable("tests")
class Gated(keras.Model):
    """Logits from ``out``; a sigmoid gate is what was assigned last."""

    def __init__(self, squash=False, **kwargs):
        super().__init__(**kwargs)
        self.squash = squash
        self.flat = layers.Flatten()
        self.out = layers.Dense(3)
        self.gate = layers.Dense(3, activation="sigmoid")

    def call(self, x):
        flat = self.flat(x)
        logits = 4.0 * self.out(flat) * self.gate(flat)
        return keras.ops.softmax(logits) if self.squash else logits

    def get_config(self):
        return {**super().get_config(), "squash": self.squash}


def built(model):
    model(np.zeros((1, *SHAPE), "float32"))
    return model


def nested():
    """A logits body and a softmax head, inside another model."""
    x = keras.Input(SHAPE)
    return keras.Sequential([keras.Input(SHAPE), keras.Model(x, functional(keras.ops.softmax)(x))])


SEEN = {
    "dense softmax": lambda: sequential(layers.Dense(3, activation="softmax")),
    "softmax layer": lambda: sequential(layers.Dense(3), layers.Softmax()),
    "activation softmax": lambda: sequential(layers.Dense(3), layers.Activation("softmax")),
    "function": lambda: sequential(layers.Dense(3, activation=keras.activations.softmax)),
    "dense sigmoid": lambda: sequential(layers.Dense(3, activation="sigmoid")),
    "one sigmoid": lambda: sequential(layers.Dense(1, activation="sigmoid")),
    "functional": lambda: functional(layers.Softmax()),
    "nested": lambda: keras.Sequential(
        [keras.Input(SHAPE), sequential(layers.Dense(3, activation="softmax"))]
    ),
    "nested twice": lambda: keras.Sequential(
        [keras.Input(SHAPE), keras.Sequential([keras.Input(SHAPE), functional(layers.Softmax())])]
    ),
    "not built": lambda: keras.Sequential(
        [layers.Flatten(), layers.Dense(3, activation="softmax")]
    ),
    "any size": lambda: keras.Sequential(
        [
            keras.Input((None, None, 1)),
            layers.GlobalAveragePooling2D(),
            layers.Dense(3, activation="softmax"),
        ]
    ),
}
MEASURED = {
    "ops.softmax": lambda: functional(keras.ops.softmax),
    "lambda": lambda: functional(layers.Lambda(lambda z: keras.ops.softmax(z))),
    "nested ops.softmax": nested,
    "normalised": lambda: functional(
        lambda z: keras.ops.exp(z) / keras.ops.sum(keras.ops.exp(z), axis=-1, keepdims=True)
    ),
    "rescaled": lambda: functional(lambda z: layers.Rescaling(1.0)(layers.Softmax()(z))),
}


@pytest.mark.parametrize("make", SEEN.values(), ids=SEEN)
def test_a_squashing_last_layer_is_refused(make):
    with pytest.raises(UserError) as caught:
        require_logits(make())
    message = str(caught.value)
    assert "must end in logits. Received: last layer " in message
    assert "activation='softmax'" in message or "activation='sigmoid'" in message
    assert "Make the last layer linear (activation=None)" in message and "\n" not in message


@pytest.mark.parametrize("make", MEASURED.values(), ids=MEASURED)
def test_probabilities_are_recognised_by_their_values(make):
    with pytest.raises(UserError) as caught:
        require_logits(make())
    message = str(caught.value)
    assert "Received: outputs that are non-negative and sum to 1" in message
    assert "Make the last layer linear (activation=None)" in message and "\n" not in message


@pytest.mark.parametrize("precision", ["mixed_bfloat16", "mixed_float16"])
def test_probabilities_in_half_precision_are_recognised_too(precision):
    """Rounded to 8 or 11 bits, they sum to 1 within a few thousandths only."""
    random.seed(0)
    policy = keras.config.dtype_policy()
    keras.config.set_dtype_policy(precision)
    try:
        x = keras.Input(SHAPE)
        logits = layers.Dense(10)(layers.Flatten()(x))
        model = keras.Model(x, keras.ops.softmax(logits))
    finally:
        keras.config.set_dtype_policy(policy)
    with pytest.raises(UserError, match="must end in logits"):
        require_logits(model)


@pytest.mark.parametrize(
    ("make", "received"),
    [
        (lambda: sequential(layers.Dense(1)), "(4, 1)"),
        (lambda: keras.Sequential([keras.Input(SHAPE), layers.Conv2D(2, 3)]), "(4, 2, 2, 2)"),
        (lambda: functional(lambda z: [z, z + 1]), "2 outputs"),
    ],
    ids=["one output", "an image", "two outputs"],
)
def test_the_output_must_be_one_row_of_logits(make, received):
    with pytest.raises(UserError) as caught:
        require_logits(make())
    message = str(caught.value)
    assert "K >= 2" in message and received in message and "\n" not in message


def test_only_keras_models():
    for value in (None, lambda x: x, layers.Dense(3)):
        with pytest.raises(UserError, match=r"must be a keras\.Model\. Received: "):
            require_logits(value)


def with_bias(value):
    """Weights zero: every image gets the logits ``value``."""
    return sequential(
        layers.Dense(
            len(value),
            kernel_initializer="zeros",
            bias_initializer=lambda shape, dtype=None: keras.ops.convert_to_tensor(value, dtype),
        )
    )


ACCEPTED = {
    "linear": lambda: sequential(layers.Dense(3)),
    "all zeros": lambda: with_bias([0.0, 0.0, 0.0]),
    "non-negative": lambda: with_bias([0.0, 0.5, 1.5]),
    "sums to one but negative": lambda: with_bias([-1.0, 0.5, 1.5]),
    "relu": lambda: sequential(layers.Dense(3, activation="relu")),
    "softmax before the last layer": lambda: sequential(
        layers.Dense(3, activation="softmax"), layers.Dense(3)
    ),
    "temperature": lambda: functional(lambda z: z / 2.0),
    "functional linear": lambda: functional(layers.Activation("linear")),
    "not built": lambda: keras.Sequential([layers.Flatten(), layers.Dense(3)]),
    "any size": lambda: keras.Sequential(
        [keras.Input((None, None, 1)), layers.GlobalAveragePooling2D(), layers.Dense(3)]
    ),
    "subclass": Subclassed,
}


@pytest.mark.parametrize("make", ACCEPTED.values(), ids=ACCEPTED)
def test_logits_are_accepted(make):
    random.seed(0)
    assert require_logits(make()) is None


def test_a_subclassed_model_is_checked_once_it_is_built():
    model = Subclassed(activation="softmax")
    model(np.zeros((1, *SHAPE), "float32"))
    with pytest.raises(UserError, match="must end in logits"):
        require_logits(model)


def test_of_a_subclassed_model_only_the_numbers_count():
    """Which layer was assigned last says nothing."""
    random.seed(0)
    assert require_logits(built(Gated())) is None
    inside = keras.Sequential([keras.Input(SHAPE), Gated()])
    assert require_logits(inside) is None
    for model in (built(Gated(squash=True)), keras.Sequential([keras.Input(SHAPE), Gated(True)])):
        with pytest.raises(UserError, match="non-negative and sum to 1"):
            require_logits(model)


def any_size(end):
    x = keras.Input((None, None, 1))
    return keras.Model(x, end(layers.Dense(3)(layers.GlobalAveragePooling2D()(x))))


@pytest.mark.parametrize("make", [lambda: Gated(squash=True), lambda: any_size(keras.ops.softmax)])
def test_a_caller_may_know_the_shape_that_the_model_does_not(make):
    assert require_logits(make()) is None
    assert require_logits(make(), (None, None, 1)) is None
    for shape in (SHAPE, list(SHAPE)):
        with pytest.raises(UserError, match="non-negative and sum to 1"):
            require_logits(make(), shape)
    # Its own shape comes first.
    assert require_logits(sequential(layers.Dense(3)), (9, 9, 3)) is None


def test_a_network_knows_the_classes_of_every_kind_of_model():
    for model in (sequential(layers.Dense(3)), any_size(layers.Activation("linear"))):
        assert Network(model).classes == 3
    assert Network(built(Gated())).classes == 3
    with pytest.raises(UserError, match=r"not built\. Received: .*Call it"):
        Network(Gated()).classes  # noqa: B018


def test_what_we_borrow_from_keras_means_what_we_think():
    """``full_precision`` stands on two private names: `_flatten_layers`, `_dtype_policy`."""
    policy = keras.config.dtype_policy()
    keras.config.set_dtype_policy("mixed_float16")
    try:
        inner = sequential(layers.Dense(5))
        model = keras.Sequential([keras.Input(SHAPE), inner, layers.Dense(3)])
    finally:
        keras.config.set_dtype_policy(policy)
    found = list(model._flatten_layers())
    nested_layers = [model, *model.layers, *inner.layers]
    assert all(any(layer is f for f in found) for layer in nested_layers)
    for layer in nested_layers:
        assert layer._dtype_policy is layer.dtype_policy
    x = keras.ops.convert_to_tensor(np.random.default_rng(0).uniform(size=(4, *SHAPE)), "float32")

    def dtype(output):
        return keras.backend.standardize_dtype(output.dtype)

    assert dtype(model(x)) == "float16"
    with full_precision(model):
        logits = model(x)
        assert {layer.compute_dtype for layer in nested_layers} == {"float32"}
    assert dtype(logits) == "float32"
    assert {layer.compute_dtype for layer in nested_layers} == {"float16"}  # as they were
    # Not float16 numbers in a wider type: what the weights give in float32.
    rows = np.reshape(keras.ops.convert_to_numpy(x), (4, -1)).astype("float64")
    for dense in (inner.layers[-1], model.layers[-1]):
        kernel, bias = (keras.ops.convert_to_numpy(w).astype("float64") for w in dense.weights)
        rows = rows @ kernel + bias
    np.testing.assert_allclose(keras.ops.convert_to_numpy(logits), rows, rtol=1e-5, atol=1e-6)


def test_the_check_changes_nothing():
    """Neither weights nor random state: BatchNorm statistics and seeds stay as they were."""
    model = sequential(
        layers.Dense(3), layers.BatchNormalization(), layers.Dropout(0.5), layers.Dense(3)
    )
    before = [keras.ops.convert_to_numpy(v) for v in model.variables]
    state = np.random.get_state()[1].copy()
    require_logits(model)
    for old, new in zip(before, model.variables, strict=True):
        np.testing.assert_array_equal(old, keras.ops.convert_to_numpy(new))
    np.testing.assert_array_equal(np.random.get_state()[1], state)
