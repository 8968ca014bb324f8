"""Inference without Keras's calls of layers: the same numbers, and what own layers do besides."""

import keras
import numpy as np
import pytest
from keras import layers, ops

from keras_emr.models.registry import make_model
from keras_emr.network.inference import Inference, graph_of
from keras_emr.network.substitution import changed, precision
from tests.builders import images

SHAPE, CLASSES = (8, 8, 1), 3


def body(x):
    x = layers.Conv2D(4, 3, padding="same", use_bias=False)(x)
    x = layers.BatchNormalization()(x)
    x = layers.Activation("relu")(x)
    return layers.Dropout(0.5)(x)


def chain(**options):
    x = entry = keras.Input(SHAPE)
    x = layers.Flatten()(layers.MaxPooling2D(2)(body(x)))
    return keras.Model(entry, layers.Dense(CLASSES, **options)(x))


def sequential():
    return keras.Sequential(
        [keras.Input(SHAPE), layers.Conv2D(3, 3), layers.Flatten(), layers.Dense(CLASSES)]
    )


def nested():
    inner_entry = keras.Input((8, 8, 4))
    inner = keras.Model(inner_entry, layers.Add()([inner_entry, body(inner_entry)]))
    head = keras.Sequential([layers.GlobalAveragePooling2D(), layers.Dense(CLASSES)])
    x = entry = keras.Input(SHAPE)
    return keras.Model(entry, head(inner(inner(body(x)))))  # one of them twice


def operations():
    """Operations that are no layers: of two tensors, with options, with several outputs."""
    x = entry = keras.Input(SHAPE)
    first, second = ops.split(ops.concatenate([body(x), 2.0 - body(x)], axis=-1), 2, axis=-1)
    x = layers.Concatenate()([ops.maximum(first, 0.1), layers.Average()([first, second])])
    (x,) = ops.split(layers.Multiply()([x, ops.clip(x, -1.0, 1.0)]), 1, axis=-1)
    return keras.Model(entry, layers.Dense(CLASSES)(ops.mean(x, axis=(1, 2))))


def told_to_train():
    """Its author's ``training=True`` gives way to the caller's ``training=False``."""
    x = entry = keras.Input(SHAPE)
    x = layers.Dropout(0.5)(layers.BatchNormalization()(x, training=True), training=True)
    return keras.Model(entry, layers.Dense(CLASSES)(layers.Flatten()(x)))


class Own(layers.Layer):
    """With a loss, and a mask that Keras hands to the layers after it."""

    supports_masking = True

    def call(self, x, training=None, mask=None):
        assert not training
        self.add_loss(ops.sum(x))
        return x + (1.0 if mask is None else 5.0)

    def compute_mask(self, x, mask=None):
        return ops.any(x > 0.5, axis=-1)


def own_layers():
    """The second one adds 5: the layers of Keras between them hand the mask of the first on."""
    x = entry = keras.Input(SHAPE)
    x = Own()(layers.Dropout(0.1)(layers.Activation("tanh")(Own()(x))))
    return keras.Model(entry, layers.Dense(CLASSES)(layers.GlobalAveragePooling2D()(x)))


class Scaled(layers.Layer):
    def call(self, x, scale=2.0):
        return x if scale is None else scale * x


def named_arguments():
    x = entry = keras.Input(SHAPE)
    x = Scaled()(Scaled()(x, scale=None), scale=3.0)
    return keras.Model(entry, layers.Dense(CLASSES)(layers.Flatten()(x)))


class Quiet(layers.Layer):
    """Has no ``training``, but a layer that is told it by Keras, and draws unless it is told."""

    def __init__(self):
        super().__init__()
        self.flip = layers.RandomFlip(seed=0)

    def call(self, x):
        return self.flip(x)

    def build(self, shape):
        self.built = True

    def compute_output_shape(self, shape):
        return shape


def quiet_layers():
    x = entry = keras.Input(SHAPE)
    x = layers.Reshape((1, *SHAPE))(Quiet()(x))
    x = layers.TimeDistributed(Quiet())(x)
    return keras.Model(entry, layers.Dense(CLASSES)(layers.Flatten()(x)))


def masks():
    """Layers of Keras that make masks, and one that heeds them."""
    x = entry = keras.Input(SHAPE)
    x = layers.Reshape((8, 8))(x)
    x = layers.Lambda(lambda x: 2.0 * x, mask=lambda x, mask: ops.max(x, axis=-1) > 0.7)(x)
    x = layers.Masking(0.1)(layers.ReLU()(x))
    return keras.Model(entry, layers.Dense(CLASSES)(layers.GlobalAveragePooling1D()(x)))


def quantized():
    model = chain()
    randomized(model).quantize("int8")
    return model


def attention():
    """A layer with arguments by name and layers of its own."""
    x = entry = keras.Input(SHAPE)
    x = layers.Reshape((8, 8))(x)
    x = layers.MultiHeadAttention(2, 4, dropout=0.2)(query=x, value=x, use_causal_mask=True)
    return keras.Model(entry, layers.Dense(CLASSES)(layers.Flatten()(x)))


class Subclass(keras.Model):
    def __init__(self):
        super().__init__()
        self.dense = layers.Dense(CLASSES)

    def call(self, x, training=None):
        assert not training
        return self.dense(ops.reshape(x, (-1, 64)))


class OwnFunctional(keras.Model):
    """A functional model with something to do around its graph."""

    def call(self, x, training=None):
        return 2.0 * super().call(x, training=training)


def own_functional():
    x = entry = keras.Input(SHAPE)
    return OwnFunctional(entry, layers.Dense(CLASSES)(layers.Flatten()(x)))


def twins():
    """Two entries: no classifier, but a part of one."""
    left, right = keras.Input((4,)), keras.Input((4,))
    both = keras.Model([left, right], layers.Add()([layers.Dense(3)(left), right[:, :3]]))
    x = entry = keras.Input(SHAPE)
    x = layers.Flatten()(x)
    return keras.Model(entry, layers.Dense(CLASSES)(both([x[:, :4], x[:, 4:8]])))


MODELS = (
    chain,
    sequential,
    nested,
    operations,
    told_to_train,
    own_layers,
    named_arguments,
    quiet_layers,
    masks,
    quantized,
    attention,
    Subclass,
    own_functional,
    twins,
)
# What Keras runs itself, layer by layer.
KEPT = (Subclass, own_functional)


def randomized(model):
    rng = np.random.default_rng(0)
    model(ops.zeros((1, *SHAPE)), training=False)
    model.set_weights([rng.uniform(0.2, 1, w.shape) for w in model.get_weights()])
    return model


def called(monkeypatch):
    """Names of the layers that are called from here on, in order."""
    names, call = [], layers.Layer.__call__

    def noting(self, *args, **kwargs):
        names.append(type(self).__name__)
        return call(self, *args, **kwargs)

    monkeypatch.setattr(layers.Layer, "__call__", noting)
    return names


@pytest.mark.filterwarnings("ignore:.*was passed an input with a mask")
@pytest.mark.filterwarnings("ignore:Layer .* does not have a `quantize` method")
@pytest.mark.parametrize("make", MODELS)
def test_the_numbers_are_the_models_own(make):
    model, x = randomized(make()), ops.convert_to_tensor(images(5, 8)[0])
    want, losses = ops.convert_to_numpy(model(x, training=False)), len(model.losses)
    assert (graph_of(model) is None) == (make in KEPT)
    got = Inference(model)(x)
    np.testing.assert_array_equal(ops.convert_to_numpy(got), want)
    assert np.abs(want).max() > 0.1 and want.std() > 1e-3
    assert losses == len(model.losses) == 2 * (make is own_layers)


@pytest.mark.filterwarnings("ignore:.*was passed an input with a mask")
@pytest.mark.parametrize(
    ("make", "names"),
    [
        (chain, []),
        (nested, []),
        (operations, []),
        (masks, ["Lambda", "ReLU", "Masking", "GlobalAveragePooling1D"]),
        (own_layers, ["Own", "Activation", "Dropout", "Own", "GlobalAveragePooling2D"]),
        (own_functional, ["OwnFunctional", "Flatten", "Dense"]),
        (twins, ["Functional", "Dense", "Add"]),
    ],
)
def test_keras_calls_only_what_is_not_its_own(make, names, monkeypatch):
    model = randomized(make())
    inference, x = Inference(model), ops.convert_to_tensor(images(2, 8)[0])
    seen = called(monkeypatch)
    inference(x)
    assert seen == names


def test_a_layer_with_an_activity_penalty_is_called():
    model = randomized(chain(activity_regularizer="l2"))
    Inference(model)(ops.convert_to_tensor(images(2, 8)[0]))
    assert len(model.losses) == 1


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "bfloat16", "float64"])
def test_every_layer_computes_in_its_own_precision(policy):
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(policy)
    try:
        x = entry = keras.Input(SHAPE, dtype="float32")
        x = layers.Flatten()(body(x))
        model = keras.Model(entry, layers.Dense(CLASSES, dtype="float32")(x))
    finally:
        keras.config.set_dtype_policy(before)
    randomized(model)
    x = ops.convert_to_tensor(images(4, 8)[0])
    want, got = model(x, training=False), Inference(model)(x)
    assert keras.backend.standardize_dtype(got.dtype) == "float32"
    np.testing.assert_array_equal(ops.convert_to_numpy(got), ops.convert_to_numpy(want))


class Exact(layers.Layer):
    """Wants its weight as it is."""

    def __init__(self):
        super().__init__(autocast=False)
        self.shift = self.add_weight(shape=(), initializer="ones")

    def call(self, x):
        assert keras.backend.standardize_dtype(self.shift.value.dtype) == "float32"
        return x + ops.cast(self.shift, x.dtype)


def test_a_layer_that_casts_nothing_gets_its_weights_whole():
    x = entry = keras.Input(SHAPE)
    x = layers.Flatten()(Exact()(layers.Conv2D(4, 3)(x)))
    model, x = randomized(keras.Model(entry, layers.Dense(3)(x))), images(4, 8)[0]
    inference, x = Inference(model), ops.convert_to_tensor(x)
    with changed(precision(list(model._flatten_layers()), "bfloat16")):
        want, got = model(x, training=False), inference(x)
    assert keras.backend.standardize_dtype(got.dtype) == "bfloat16"
    want, got = (ops.convert_to_numpy(ops.cast(v, "float32")) for v in (want, got))
    np.testing.assert_array_equal(got, want)


def test_a_precision_that_is_changed_afterwards_counts():
    model, x = randomized(chain()), ops.convert_to_tensor(images(4, 8)[0])
    inference = Inference(model)
    wide = ops.convert_to_numpy(inference(x))
    with changed(precision(model.layers, "bfloat16")):
        narrow = inference(x)
        want = model(x, training=False)
    assert keras.backend.standardize_dtype(narrow.dtype) == "bfloat16"
    narrow, want = (ops.convert_to_numpy(ops.cast(v, "float32")) for v in (narrow, want))
    np.testing.assert_array_equal(narrow, want)
    assert 0 < np.abs(narrow - wide).max() < 0.1 * np.abs(wide).max()


@pytest.mark.parametrize("shape", [(2, 8, 8, 3), (2, 7, 8, 1), (8, 8)])
def test_images_of_another_shape_are_refused_in_keras_words(shape):
    model, x = randomized(chain()), ops.zeros(shape)
    with pytest.raises(ValueError) as wanted:
        model(x, training=False)
    with pytest.raises(ValueError) as found:
        Inference(model)(x)
    assert str(found.value) == str(wanted.value)


def test_images_of_another_precision_or_without_channels_are_taken_as_keras_takes_them():
    model, x = randomized(chain()), images(4, 8)[0]
    for other in (x.astype("float64"), x[..., 0]):
        other = ops.convert_to_tensor(other)
        want, got = model(other, training=False), Inference(model)(other)
        np.testing.assert_array_equal(ops.convert_to_numpy(got), ops.convert_to_numpy(want))


@pytest.mark.parametrize("name", ["mlp", "small-cnn", "resnet18"])
def test_no_layer_of_our_networks_is_called_but_normalization(name, monkeypatch):
    shape = (32, 32, 3) if name == "resnet18" else (28, 28, 1)
    model = make_model(name, shape, 10)
    inference, x = Inference(model), ops.zeros((1, *shape))
    seen = called(monkeypatch)
    inference(x)
    assert set(seen) <= {"Normalization"}
