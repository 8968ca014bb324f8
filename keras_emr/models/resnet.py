"""ResNet-18 for CIFAR-sized images, and its pre-activation variant."""

import keras
from keras import layers

from keras_emr.models import blocks

_STAGES = ((64, 1), (128, 2), (256, 2), (512, 2))


def resnet18(input_shape, classes, activation="relu", normalization=None, width=64):
    """The CIFAR ResNet-18: 3x3 stem of stride 1, four stages of two basic blocks, no max pooling.

    (He et al., CVPR 2016, as MAIL, MART and their successors use it on 32x32 images.)

    Args:
        input_shape: (H, W, C); any size.
        classes: number of classes K.
        activation: one of ``keras_emr.models.ACTIVATIONS``.
        normalization: ``None``, ``"cifar10"`` or ``(mean, std)`` per channel, inside the model.
        width: channels of the first stage.

    Raises:
        UserError: an unknown activation, or a normalization for other channels.

    Returns:
        Keras model, (N, H, W, C) images in [0, 1] to (N, K) logits.
    """
    entry, x = blocks.inputs(input_shape, normalization)
    x = blocks.activate(blocks.batch_norm(blocks.convolution(x, width)), activation)
    for planes, stride in _stages(width):
        shortcut = x
        if stride != 1 or x.shape[-1] != planes:
            shortcut = blocks.batch_norm(blocks.convolution(x, planes, 1, stride))
        x = blocks.activate(blocks.batch_norm(blocks.convolution(x, planes, 3, stride)), activation)
        x = blocks.batch_norm(blocks.convolution(x, planes))
        x = blocks.activate(layers.Add()([x, shortcut]), activation)
    return keras.Model(entry, blocks.head(x, classes), name="resnet18")


def preact_resnet18(input_shape, classes, activation="relu", normalization=None, width=64):
    """The pre-activation ResNet-18 (He et al., ECCV 2016) with a last BatchNorm and activation.

    Arguments, errors and result as :func:`resnet18`. A shortcut that changes the shape is a 1x1
    convolution of the activated input.
    """
    entry, x = blocks.inputs(input_shape, normalization)
    x = blocks.convolution(x, width)
    for planes, stride in _stages(width):
        active = blocks.activate(blocks.batch_norm(x), activation)
        shortcut = x
        if stride != 1 or x.shape[-1] != planes:
            shortcut = blocks.convolution(active, planes, 1, stride)
        x = blocks.convolution(active, planes, 3, stride)
        x = blocks.convolution(blocks.activate(blocks.batch_norm(x), activation), planes)
        x = layers.Add()([x, shortcut])
    x = blocks.activate(blocks.batch_norm(x), activation)
    return keras.Model(entry, blocks.head(x, classes), name="preact_resnet18")


def _stages(width):
    """(channels, stride) of the eight blocks."""
    for planes, stride in _STAGES:
        yield planes * width // 64, stride
        yield planes * width // 64, 1
