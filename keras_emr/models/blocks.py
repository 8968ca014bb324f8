"""Pieces of the CIFAR-sized networks, with PyTorch's padding, BatchNorm and initial weights."""

import keras
from keras import layers

from keras_emr.errors import UserError
from keras_emr.models import ACTIVATIONS, LEAKY_SLOPE, NORMALIZATIONS
from keras_emr.part import one_of


def activation(name):
    """What ``activation=`` of a layer takes for a name of ``ACTIVATIONS``."""
    one_of("activation", name, ACTIVATIONS)
    return layers.LeakyReLU(negative_slope=LEAKY_SLOPE) if name == "leaky_relu" else name


def activate(x, name):
    chosen = activation(name)
    layer = layers.Activation(chosen) if isinstance(chosen, str) else chosen
    return layer(x)


def normalized(input_shape, normalization):
    """The layer that normalises the images, in a list; nothing for ``None``.

    Args:
        input_shape: (H, W, C).
        normalization: ``None``, ``"cifar10"``, or ``(mean, std)`` with a number per channel.
    """
    if normalization is None:
        return []
    if isinstance(normalization, str):
        one_of("normalization", normalization, tuple(NORMALIZATIONS))
        normalization = NORMALIZATIONS[normalization]
    mean, std = ([float(v) for v in part] for part in normalization)
    if not len(mean) == len(std) == input_shape[-1] or min(std) <= 0:
        raise UserError(
            f"normalization must have a mean and a std > 0 per channel. Received: {mean}, {std} "
            f"for images {tuple(input_shape)}."
        )
    variance = [v * v for v in std]
    return [layers.Normalization(mean=mean, variance=variance, name="normalization")]


def inputs(input_shape, normalization=None):
    """``(input, images)``: the [0, 1] images and what the first convolution sees of them."""
    entry = keras.Input(tuple(input_shape))
    x = entry
    for layer in normalized(input_shape, normalization):
        x = layer(x)
    return entry, x


def torch_uniform():
    """PyTorch's own start of convolutions and dense layers: U(+-1 / sqrt(fan_in))."""
    return keras.initializers.VarianceScaling(1 / 3, mode="fan_in", distribution="uniform")


def fan_out_normal():
    """N(0, 2 / (k k out)), as the WideResNets of TRADES and EMR start."""
    return keras.initializers.VarianceScaling(2.0, "fan_out", distribution="untruncated_normal")


def convolution(x, filters, size=3, stride=1, use_bias=False, initializer=torch_uniform):
    """A convolution padded by ``size // 2`` on every side: at stride 2 Keras's own differs."""
    padding = "same"
    if stride > 1:
        padding = "valid"
        if size > 1:
            x = layers.ZeroPadding2D(size // 2)(x)
    return layers.Conv2D(
        filters,
        size,
        stride,
        padding=padding,
        use_bias=use_bias,
        kernel_initializer=initializer(),
    )(x)


def batch_norm(x):
    return layers.BatchNormalization(momentum=0.9, epsilon=1e-5)(x)


def head(x, classes):
    """Mean over the map, logits. On 32x32 images that mean is the authors' 4x4 or 8x8 pooling."""
    x = layers.GlobalAveragePooling2D()(x)
    return layers.Dense(classes, kernel_initializer=torch_uniform(), name="logits")(x)
