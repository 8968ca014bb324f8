"""A multi-layer perceptron, for small images and quick checks."""

import keras
from keras import layers


def mlp(input_shape, classes, hidden=(256, 256), activation="relu"):
    """Flatten, dense layers, logits.

    Args:
        input_shape: (H, W, C).
        classes: number of classes K.
        hidden: widths of the hidden layers.
        activation: of the hidden layers.

    Returns:
        Keras model, (N, H, W, C) images in [0, 1] to (N, K) logits.
    """
    stack = [keras.Input(input_shape), layers.Flatten()]
    stack += [layers.Dense(width, activation=activation) for width in hidden]
    return keras.Sequential([*stack, layers.Dense(classes, name="logits")], name="mlp")
