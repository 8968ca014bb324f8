"""The networks: shapes, weights, how they start, and that plain Keras can load them."""

import random

import keras
import numpy as np
import pytest

from keras_emr.models import MODELS, make_model
from keras_emr.models.mlp import mlp
from keras_emr.models.small_cnn import small_cnn


def layout(model):
    """Per layer: its class and the shape of its output without the batch."""
    return [(type(layer).__name__, tuple(layer.output.shape[1:])) for layer in model.layers]


def test_small_cnn_on_mnist_is_the_network_of_the_trades_code():
    model = small_cnn((28, 28, 1), 10)
    assert layout(model) == [
        ("Conv2D", (26, 26, 32)),
        ("Conv2D", (24, 24, 32)),
        ("MaxPooling2D", (12, 12, 32)),
        ("Conv2D", (10, 10, 64)),
        ("Conv2D", (8, 8, 64)),
        ("MaxPooling2D", (4, 4, 64)),
        ("Flatten", (1024,)),
        ("Dense", (200,)),
        ("Dropout", (200,)),
        ("Dense", (200,)),
        ("Dense", (10,)),
    ]
    convolutions = [9 * 1 * 32 + 32, 9 * 32 * 32 + 32, 9 * 32 * 64 + 64, 9 * 64 * 64 + 64]
    dense = [4 * 4 * 64 * 200 + 200, 200 * 200 + 200, 200 * 10 + 10]
    counts = [layer.count_params() for layer in model.layers if layer.weights]
    assert counts == convolutions + dense
    assert model.count_params() == sum(counts) == 312_202
    activations = [layer.activation.__name__ for layer in model.layers if layer.weights]
    assert activations == ["relu"] * 6 + ["linear"]
    assert model.get_layer(index=8).rate == 0.5


def test_small_cnn_pads_small_images():
    model = small_cnn((8, 8, 1), 3)
    assert layout(model)[:7] == [
        ("Conv2D", (8, 8, 32)),
        ("Conv2D", (8, 8, 32)),
        ("MaxPooling2D", (4, 4, 32)),
        ("Conv2D", (4, 4, 64)),
        ("Conv2D", (4, 4, 64)),
        ("MaxPooling2D", (2, 2, 64)),
        ("Flatten", (256,)),
    ]
    assert model.output_shape == (None, 3)


@pytest.mark.parametrize(
    ("shape", "padding", "flat"),
    [
        ((16, 16, 1), None, 64),  # 16 14 12 6 4 2 1, valid
        ((15, 15, 1), None, 9 * 64),  # 15 15 15 7 7 7 3, same
        ((16, 15, 1), None, 4 * 3 * 64),  # the smaller side decides
        ((28, 28, 1), "same", 49 * 64),
    ],
)
def test_small_cnn_padding(shape, padding, flat):
    assert layout(small_cnn(shape, 2, padding=padding))[6] == ("Flatten", (flat,))


def test_small_cnn_starts_as_in_the_trades_code():
    """Kaiming-normal convolutions, and a last layer of zeros: all logits are equal at first."""
    random.seed(0)
    model = small_cnn((28, 28, 1), 10)
    # Within 5 standard errors of the deviation sqrt(2 / fan_in) and the mean 0.
    for index, fan_in in ((1, 9 * 32), (3, 9 * 32), (4, 9 * 64)):
        kernel = keras.ops.convert_to_numpy(model.layers[index].kernel)
        deviation, n = np.sqrt(2 / fan_in), kernel.size
        assert abs(kernel.std() / deviation - 1) < 5 / np.sqrt(2 * n)
        assert abs(kernel.mean()) < 5 * deviation / np.sqrt(n)
    for variable in model.layers[-1].weights:
        assert not keras.ops.convert_to_numpy(variable).any()
    x = np.random.default_rng(0).uniform(size=(3, 28, 28, 1)).astype("float32")
    np.testing.assert_array_equal(keras.ops.convert_to_numpy(model(x)), np.zeros((3, 10)))


def test_small_cnn_dropout():
    random.seed(0)
    model = small_cnn((8, 8, 1), 2)
    model.layers[-1].kernel.assign(np.ones((200, 2)))
    x = np.ones((2, 8, 8, 1), "float32")
    first, second = (keras.ops.convert_to_numpy(model(x, training=True)) for _ in range(2))
    assert not np.allclose(first, second)
    still = [keras.ops.convert_to_numpy(model(x, training=False)) for _ in range(2)]
    np.testing.assert_array_equal(*still)
    assert small_cnn((8, 8, 1), 2, dropout=0.25).layers[8].rate == 0.25


def test_mlp():
    model = mlp((8, 8, 3), 3)
    assert layout(model) == [
        ("Flatten", (192,)),
        ("Dense", (256,)),
        ("Dense", (256,)),
        ("Dense", (3,)),
    ]
    assert model.count_params() == 192 * 256 + 256 + 256 * 256 + 256 + 256 * 3 + 3
    assert [layer.activation.__name__ for layer in model.layers[1:]] == ["relu", "relu", "linear"]
    other = mlp((8, 8, 3), 3, hidden=(7,), activation="tanh")
    assert layout(other)[1:] == [("Dense", (7,)), ("Dense", (3,))]
    assert other.layers[1].activation.__name__ == "tanh"


def test_mlp_computes_what_its_weights_say():
    model = mlp((2, 2, 1), 2, hidden=(3,))
    rng = np.random.default_rng(0)
    w1, b1, w2, b2 = (rng.normal(size=v.shape) for v in model.weights)
    model.set_weights([w1, b1, w2, b2])
    x = rng.uniform(size=(5, 2, 2, 1))
    expected = np.maximum(x.reshape(5, 4) @ w1 + b1, 0) @ w2 + b2
    found = keras.ops.convert_to_numpy(model(x.astype("float32")))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", [*MODELS.names, "wide-resnet-10-1", "wide-resnet-10-1-emr"])
def test_models_are_made_of_built_in_layers_only(name):
    """tests/cli loads saved files in a process that cannot import ``keras_emr``."""
    side = 32 if name == "vgg16" else 8
    model = make_model(name, (side, side, 3), 3, normalization="cifar10")
    assert type(model) in (keras.Sequential, keras.src.models.Functional)
    assert len(model.layers) == len(getattr(model, "operations", model.layers))
    for layer in model.layers:
        assert getattr(keras.layers, type(layer).__name__) is type(layer)
        assert not isinstance(layer, keras.layers.Lambda)
