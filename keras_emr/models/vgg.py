"""VGG-16 for CIFAR-sized images."""

import keras
from keras import layers

from keras_emr.errors import UserError
from keras_emr.models import blocks

_PLAN = ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))


def vgg16(input_shape, classes, activation="relu", normalization=None):
    """13 3x3 convolutions with bias and BatchNorm in five blocks, each pooled, and one dense layer.

    The VGG-16 of the adversarial training literature on CIFAR-10 (Simonyan & Zisserman, ICLR 2015,
    without its dense layers); 14,728,266 trainable weights for (32, 32, 3) and 10 classes.

    Args:
        input_shape: (H, W, C), H and W at least 32.
        classes: number of classes K.
        activation: one of ``keras_emr.models.ACTIVATIONS``.
        normalization: ``None``, ``"cifar10"`` or ``(mean, std)`` per channel, inside the model.

    Raises:
        UserError: the image is too small for five poolings, or an unknown activation.

    Returns:
        Keras model, (N, H, W, C) images in [0, 1] to (N, K) logits.
    """
    if min(input_shape[:2]) < 32:
        raise UserError(
            "vgg16 needs images of at least 32x32 pixels. Received: input shape "
            f"{tuple(input_shape)}. Use resnet18 or small-cnn for smaller images."
        )
    entry, x = blocks.inputs(input_shape, normalization)
    for filters, count in _PLAN:
        for _ in range(count):
            x = blocks.convolution(x, filters, use_bias=True)
            x = blocks.activate(blocks.batch_norm(x), activation)
        x = layers.MaxPooling2D(2)(x)
    return keras.Model(entry, blocks.head(x, classes), name="vgg16")
