"""A multi-layer perceptron, for small images and quick checks."""

import keras
from keras import layers

from keras_emr.models import blocks


def mlp(input_shape, classes, hidden=(256, 256), activation="relu", normalization=None):
    """Flatten, dense layers, logits.

    Args:
        input_shape: (H, W, C).
        classes: number of classes K.
        hidden: widths of the hidden layers.
        activation: of the hidden layers, one of ``keras_emr.models.ACTIVATIONS``.
        normalization: ``None``, ``"cifar10"`` or ``(mean, std)`` per channel, inside the model.

    Returns:
        Keras model, (N, H, W, C) images in [0, 1] to (N, K) logits.
    """
    stack = [keras.Input(input_shape), *blocks.normalized(input_shape, normalization)]
    stack += [layers.Flatten()]
    stack += [layers.Dense(width, activation=blocks.activation(activation)) for width in hidden]
    return keras.Sequential([*stack, layers.Dense(classes, name="logits")], name="mlp")
