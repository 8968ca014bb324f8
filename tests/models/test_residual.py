"""VGG-16, ResNet-18 and WideResNets: parameter counts, and what they compute, in NumPy."""

import re
from itertools import pairwise

import keras
import numpy as np
import pytest

from keras_emr import backend
from keras_emr.models import ACTIVATIONS, make_model
from keras_emr.models.resnet import preact_resnet18, resnet18
from keras_emr.models.wide_resnet import wide_resnet

CIFAR = ((32, 32, 3), 10)


# Counted on one backend: they are the same layers on all.
counted_once = pytest.mark.skipif(backend.NAME != "tensorflow", reason="counted on tensorflow")


def trainable(model):
    return sum(int(np.prod(v.shape)) for v in model.trainable_variables)


@counted_once
def test_vgg16_has_the_published_number_of_parameters():
    """14,728,266: the CIFAR VGG-16 with BatchNorm and one dense layer (learned-maximizer notes)."""
    sizes = [3, *[64] * 2, *[128] * 2, *[256] * 3, *[512] * 6]
    counted = sum(9 * a * b + b + 2 * b for a, b in pairwise(sizes))
    assert trainable(make_model("vgg16", *CIFAR)) == counted + 512 * 10 + 10 == 14_728_266


def stage_counts(shortcut, norms_per_block):
    """Convolutions, shortcuts and BatchNorms of ResNet-18's stages, by arithmetic."""
    total, before = 0, 64
    for planes in (64, 128, 256, 512):
        for _ in range(2):
            total += 9 * before * planes + 9 * planes * planes + norms_per_block(before, planes)
            total += shortcut(before, planes) if before != planes else 0
            before = planes
    return total


@counted_once
def test_resnet18_count():
    """By arithmetic: the sources at hand print none."""
    stages = stage_counts(lambda a, b: a * b + 2 * b, lambda a, b: 4 * b)
    expected = 9 * 3 * 64 + 2 * 64 + stages + 512 * 10 + 10
    assert trainable(make_model("resnet18", *CIFAR)) == expected == 11_173_962


@counted_once
def test_preact_resnet18_count():
    """By arithmetic, with the last BatchNorm."""
    stages = stage_counts(lambda a, b: a * b, lambda a, b: 2 * a + 2 * b)
    expected = 9 * 3 * 64 + stages + 2 * 512 + 512 * 10 + 10
    assert trainable(make_model("preact-resnet18", *CIFAR)) == expected == 11_172_170


def wide_count(depth, widen, variant):
    total, before = 9 * 3 * 16, 16
    for planes in (16 * widen, 32 * widen, 64 * widen):
        for block in range((depth - 4) // 6):
            a = planes if block else before
            total += 9 * a * planes + 9 * planes * planes + 2 * a + 2 * planes
            total += a * planes if a != planes and variant == "trades" else 0
        before = planes
    return total + 2 * before + before * 10 + 10


@counted_once
@pytest.mark.parametrize(
    ("name", "depth", "widen", "variant", "count"),
    [
        ("wide-resnet-34-10", 34, 10, "trades", 46_160_474),
        ("wide-resnet-34-10-emr", 34, 10, "emr", 45_901_914),
        ("wide-resnet-28-4", 28, 4, "trades", None),
        ("wide-resnet-16-1-emr", 16, 1, "emr", None),
    ],
)
def test_wide_resnet_count(name, depth, widen, variant, count):
    """By arithmetic from the released code's layers; only what its forward pass uses."""
    found = trainable(make_model(name, *CIFAR))
    assert found == wide_count(depth, widen, variant)
    assert count is None or found == count


class Reference:
    """The layers of a model in the order they were made, with random weights, in float64."""

    def __init__(self, model, act):
        rng = np.random.default_rng(0)
        for v in model.variables:
            if v.name in ("gamma", "moving_variance"):
                v.assign(rng.uniform(0.5, 1.5, v.shape))
            elif "seed" not in v.name:
                v.assign(rng.normal(size=v.shape) / np.sqrt(max(np.prod(v.shape[:-1]), 4)))

        def kind(cls):
            found = [layer for layer in model.layers if isinstance(layer, cls)]
            found.sort(key=lambda layer: int((re.findall(r"_(\d+)$", layer.name) or [0])[0]))
            return iter([[keras.ops.convert_to_numpy(w) for w in x.weights] for x in found])

        self.convolutions = kind(keras.layers.Conv2D)
        self.norms = kind(keras.layers.BatchNormalization)
        self.dense = next(kind(keras.layers.Dense))
        self.act = act

    def conv(self, x, stride=1):
        (kernel,) = next(self.convolutions)
        size, pad = kernel.shape[0], kernel.shape[0] // 2
        x = np.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
        rows, columns = ((n - size) // stride + 1 for n in x.shape[1:3])
        out = 0
        for i in range(size):
            for j in range(size):
                window = x[:, i : i + rows * stride : stride, j : j + columns * stride : stride]
                out = out + window @ kernel[i, j].astype("float64")
        return out

    def norm(self, x, act=True):
        gamma, beta, mean, variance = next(self.norms)
        x = (x - mean) / np.sqrt(variance + 1e-5) * gamma + beta
        return self.act(x) if act else x

    def logits(self, x):
        return x.mean(axis=(1, 2)) @ self.dense[0] + self.dense[1]


def relu(x):
    return np.maximum(x, 0)


def leaky(x):
    return np.where(x > 0, x, 0.1 * x)


def assert_computes(model, expected, shape):
    x = np.random.default_rng(1).uniform(size=(2, *shape))
    wanted = expected(x)
    found = model.predict_on_batch(x.astype("float32"))
    assert np.abs(wanted).max() > 0.1
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4 * np.abs(wanted).max())


@pytest.mark.parametrize("variant", ["trades", "emr"])
def test_wide_resnet_computes_what_the_authors_code_does(variant):
    model = wide_resnet((8, 12, 3), 4, depth=16, widen=2, variant=variant)
    net = Reference(model, relu if variant == "trades" else leaky)

    def shortcut(x, planes, stride):
        if variant == "trades":
            return net.conv(x, stride)
        n, h, w, c = x.shape
        x = x.reshape(n, h // stride, stride, w // stride, stride, c).mean(axis=(2, 4))
        return np.pad(x, ((0, 0), (0, 0), (0, 0), ((planes - c) // 2,) * 2))

    def forward(x):
        x = net.conv(x)
        for planes, stride in ((32, 1), (32, 1), (64, 2), (64, 1), (128, 2), (128, 1)):
            active = net.norm(x)
            short = shortcut(active, planes, stride) if x.shape[-1] != planes else x
            x = net.conv(net.norm(net.conv(active, stride))) + short
        return net.logits(net.norm(x))

    assert_computes(model, forward, (8, 12, 3))


def stages():
    return [(p, s) for p, first in ((4, 1), (8, 2), (16, 2), (32, 2)) for s in (first, 1)]


def test_resnet18_computes_what_the_paper_says():
    model = resnet18((9, 8, 3), 4, width=4)
    net = Reference(model, relu)

    def forward(x):
        x = net.norm(net.conv(x))
        for planes, stride in stages():
            changes = stride != 1 or x.shape[-1] != planes
            short = net.norm(net.conv(x, stride), act=False) if changes else x
            x = net.norm(net.conv(x, stride))
            x = relu(net.norm(net.conv(x), act=False) + short)
        return net.logits(x)

    assert_computes(model, forward, (9, 8, 3))


def test_preact_resnet18_computes_what_the_paper_says():
    model = preact_resnet18((9, 8, 3), 4, width=4, activation="leaky_relu")
    net = Reference(model, leaky)

    def forward(x):
        x = net.conv(x)
        for planes, stride in stages():
            active = net.norm(x)
            changes = stride != 1 or x.shape[-1] != planes
            short = net.conv(active, stride) if changes else x
            x = net.conv(net.norm(net.conv(active, stride))) + short
        return net.logits(net.norm(x))

    assert_computes(model, forward, (9, 8, 3))


def test_wide_resnet_starts_as_in_the_authors_code():
    """Convolutions N(0, 2 / (k k out)), within 5 standard errors; the dense bias at zero."""
    keras.utils.set_random_seed(0)
    model = wide_resnet((8, 8, 3), 10, depth=10, widen=4)
    kernels = [w for w in model.trainable_variables if w.name == "kernel" and len(w.shape) == 4]
    assert len(kernels) == 10  # 1 + 6, and 3 shortcuts
    for kernel in kernels:
        value = keras.ops.convert_to_numpy(kernel)
        deviation = np.sqrt(2 / (value.shape[0] * value.shape[1] * value.shape[3]))
        assert abs(value.std() / deviation - 1) < 5 / np.sqrt(2 * value.size)
    assert not keras.ops.convert_to_numpy(model.layers[-1].bias).any()


@pytest.mark.parametrize("name", ["mlp", "small-cnn", "resnet18"])
def test_normalization_is_the_first_layer(name):
    """Same weights, with and without: the images are what differs, by the published constants."""
    mean, std = np.array([0.4914, 0.4822, 0.4465]), np.array([0.2471, 0.2435, 0.2616])
    model = make_model(name, (8, 8, 3), 3, normalization="cifar10")
    plain = make_model(name, (8, 8, 3), 3)
    plain.set_weights([w + 0.01 for w in plain.get_weights()])
    model.set_weights(plain.get_weights())
    x = np.random.default_rng(0).uniform(size=(2, 8, 8, 3))
    expected = keras.ops.convert_to_numpy(plain(((x - mean) / std).astype("float32")))
    found = keras.ops.convert_to_numpy(model(x.astype("float32")))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    assert np.ptp(found) > 1e-4


SCALARS = {
    "relu": relu,
    "leaky_relu": leaky,
    "elu": lambda x: np.where(x > 0, x, np.expm1(x)),
    "silu": lambda x: x / (1 + np.exp(-x)),
    "softplus": lambda x: np.log1p(np.exp(x)),
    "mish": lambda x: x * np.tanh(np.log1p(np.exp(x))),
    "tanh": np.tanh,
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_also_from_a_file(name, tmp_path):
    model = make_model("mlp", (2, 2, 1), 2, activation=name)
    model.save(tmp_path / "m.keras")
    loaded = keras.saving.load_model(tmp_path / "m.keras")
    x = np.random.default_rng(0).uniform(size=(3, 2, 2, 1)).astype("float32")
    found = keras.ops.convert_to_numpy(loaded(x))
    np.testing.assert_array_equal(found, keras.ops.convert_to_numpy(model(x)))
    if name in SCALARS:
        hidden = x.reshape(3, 4).astype("float64")
        weights = model.get_weights()
        for kernel, bias in zip(weights[0:4:2], weights[1:4:2], strict=True):
            hidden = SCALARS[name](hidden @ kernel + bias)
        np.testing.assert_allclose(found, hidden @ weights[4] + weights[5], rtol=1e-4, atol=1e-5)
