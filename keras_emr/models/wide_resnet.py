"""Wide residual networks (Zagoruyko & Komodakis, BMVC 2016) as TRADES and EMR have them."""

import keras
from keras import layers

from keras_emr.errors import UserError
from keras_emr.models import blocks
from keras_emr.part import one_of, whole

VARIANTS = ("trades", "emr")


def wide_resnet(
    input_shape,
    classes,
    depth=34,
    widen=10,
    variant="trades",
    activation=None,
    normalization=None,
    dropout=0.0,
):
    """Pre-activation WideResNet: three stages of (depth - 4) / 6 blocks, widths 16 K, 32 K, 64 K.

    The block that changes the width shares its first BatchNorm and activation between both paths;
    its shortcut is

    * ``trades``: a 1x1 convolution (ReLU; MART, AWP and RobustBench use the same network). The
      released code also builds a stage that it never calls; that is left out.
    * ``emr``: no weights: average pooling by the stride, zeros for the new channels on both sides
      (leaky ReLU of slope 0.1; the network of Madry et al.'s CIFAR-10 challenge).

    Args:
        input_shape: (H, W, C); any size.
        classes: number of classes K.
        depth: 6 n + 4.
        widen: K >= 1.
        variant: ``trades`` or ``emr``.
        activation: one of ``keras_emr.models.ACTIVATIONS``; ``None``: the variant's own.
        normalization: ``None``, ``"cifar10"`` or ``(mean, std)`` per channel, inside the model.
        dropout: rate between the convolutions of a block.

    Raises:
        UserError: a depth other than 6 n + 4, an unknown variant or activation.

    Returns:
        Keras model, (N, H, W, C) images in [0, 1] to (N, K) logits.
    """
    whole("widen", widen, 1)
    one_of("variant", variant, VARIANTS)
    if whole("depth", depth, 10) % 6 != 4:
        raise UserError(
            f"depth of a wide ResNet must be 6 n + 4. Received: {depth}. Expected 10, 16, 22, 28, "
            "34, 40 or so on."
        )
    activation = activation or ("relu" if variant == "trades" else "leaky_relu")
    entry, x = blocks.inputs(input_shape, normalization)
    x = _convolution(x, 16)
    for stage in range(3):
        planes = 16 * widen * 2**stage
        for block in range((depth - 4) // 6):
            stride = 2 if stage and not block else 1
            x = _block(x, planes, stride, variant, activation, dropout)
    x = blocks.activate(blocks.batch_norm(x), activation)
    name = f"wide_resnet_{depth}_{widen}" + ("_emr" if variant == "emr" else "")
    return keras.Model(entry, blocks.head(x, classes), name=name)


def _block(x, planes, stride, variant, activation, dropout):
    active = blocks.activate(blocks.batch_norm(x), activation)
    shortcut = x
    if x.shape[-1] != planes:
        shortcut = _shortcut(active, planes, stride, variant)
    x = _convolution(active, planes, 3, stride)
    x = blocks.activate(blocks.batch_norm(x), activation)
    if dropout:
        x = layers.Dropout(dropout)(x)
    return layers.Add()([_convolution(x, planes), shortcut])


def _shortcut(x, planes, stride, variant):
    if variant == "trades":
        return _convolution(x, planes, 1, stride)
    missing = planes - x.shape[-1]
    if stride > 1:
        x = layers.AveragePooling2D(stride, padding="same")(x)
    # ZeroPadding2D pads the axes in the middle: channels take that place for a moment.
    x = layers.Permute((1, 3, 2))(x)
    x = layers.ZeroPadding2D(((0, 0), (missing // 2, missing - missing // 2)))(x)
    return layers.Permute((1, 3, 2))(x)


def _convolution(x, filters, size=3, stride=1):
    return blocks.convolution(x, filters, size, stride, initializer=blocks.fan_out_normal)
