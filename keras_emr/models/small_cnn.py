"""The four-convolution MNIST network of the TRADES code."""

import keras
from keras import layers

from keras_emr.errors import UserError
from keras_emr.models import blocks


def small_cnn(
    input_shape, classes, padding=None, dropout=0.5, activation="relu", normalization=None
):
    """conv 32, conv 32, pool, conv 64, conv 64, pool, dense 200, dropout, dense 200, logits.

    3x3 kernels, ReLU; convolutions start He-normal and the last layer at zero, as in the TRADES
    code.

    Args:
        input_shape: (H, W, C).
        classes: number of classes K.
        padding: ``valid`` as in the TRADES code, or ``same``; ``None``: ``valid`` where the image
            is at least 16 pixels wide and high, else ``same`` (the maps would vanish).
        dropout: rate between the dense layers.
        activation: one of ``keras_emr.models.ACTIVATIONS``.
        normalization: ``None``, ``"cifar10"`` or ``(mean, std)`` per channel, inside the model.

    Raises:
        UserError: the image is too small for two poolings.

    Returns:
        Keras model, (N, H, W, C) images in [0, 1] to (N, K) logits.
    """
    side = min(input_shape[:2])
    if padding is None:
        padding = "valid" if side >= 16 else "same"
    least = 16 if padding == "valid" else 4
    if side < least:
        raise UserError(
            f"small-cnn needs images of at least {least}x{least} pixels with padding={padding!r}. "
            f"Received: input shape {tuple(input_shape)}. Use mlp for such small images."
        )

    def conv(filters):
        return layers.Conv2D(
            filters,
            3,
            padding=padding,
            activation=blocks.activation(activation),
            kernel_initializer="he_normal",
        )

    return keras.Sequential(
        [
            keras.Input(input_shape),
            *blocks.normalized(input_shape, normalization),
            conv(32),
            conv(32),
            layers.MaxPooling2D(2),
            conv(64),
            conv(64),
            layers.MaxPooling2D(2),
            layers.Flatten(),
            layers.Dense(200, activation=blocks.activation(activation)),
            layers.Dropout(dropout),
            layers.Dense(200, activation=blocks.activation(activation)),
            layers.Dense(classes, kernel_initializer="zeros", name="logits"),
        ],
        name="small_cnn",
    )
