"""Layers that for a while run otherwise: in another precision, with cheaper derivatives."""

from __future__ import annotations

import contextlib
import functools
import inspect
import operator

import keras

from keras_emr import backend

_LOW_PRECISION = ("float16", "bfloat16")
_RELU = ("relu", "leaky_relu")


@contextlib.contextmanager
def changed(changes):
    """Within the block every ``(object, attribute, value)`` of ``changes`` holds.

    For one thread at a time: blocks of two that overlap would undo each other's changes.
    """
    before = []
    try:
        for target, name, value in changes:
            kept = target, name, name in vars(target), getattr(target, name)
            # Past Keras's and torch's bookkeeping, which would track or refuse what is set.
            object.__setattr__(target, name, value)
            before.append(kept)
        yield
    finally:
        for target, name, own, value in reversed(before):
            if own:
                object.__setattr__(target, name, value)
            else:
                object.__delattr__(target, name)


def precision(layers, name):
    """Changes by which ``layers`` compute in ``name``: ``float32`` or ``bfloat16``.

    Only layers with float32 weights: whatever is float64 stays that wide.
    """
    low = name != "float32"
    policy = keras.dtype_policies.get(f"mixed_{name}" if low else name)
    return [
        (layer, "_dtype_policy", policy)
        for layer in layers
        if layer.variable_dtype == "float32"
        and (layer.compute_dtype != name if low else layer.compute_dtype in _LOW_PRECISION)
    ]


def cast_at_use(layers, name):
    """Identities of the variables that ``layers``, computing in ``name``, would cast at every use.

    An attack uses its weights once per step, and they stay as they are.
    """
    if name == "float32":
        return set()
    casting = [layer for layer in layers if layer.autocast and layer.variable_dtype == "float32"]
    exempt = {id(v) for layer in layers if not layer.autocast for v in layer.variables}
    found = {
        id(v) for layer in casting for v in layer.variables if v._autocast and v.dtype == "float32"
    }
    return found - exempt


def cheaper(layers, twice=False, constant=False):
    """Changes by which ``layers`` give the same values at less cost; see ``backend.cheaper``.

    A rectifier and a max pooling are linear where they are differentiable at all, so a second
    derivative needs no way back through what they were applied to. TensorFlow and PyTorch take it
    all the same, with zeros.

    Args:
        twice: the results will be differentiated twice.
        constant: the weights stay as they are at the first call, to the end of the changes' use.
    """
    parts = backend.cheaper(twice)
    found = []
    for layer in layers:
        found += _rectified(layer, parts) + _pooled(layer, parts)
        found += _convolved(layer, parts, constant) + _normalized(layer, parts)
    return found


# These draw numbers in training, and do nothing else that inference does not.
_RANDOM = (
    keras.layers.AlphaDropout,
    keras.layers.Dropout,
    keras.layers.GaussianDropout,
    keras.layers.GaussianNoise,
)


def repeatable(layers):
    """Whether one can be called twice, in training and in inference, for one set of derivatives.

    That is where nothing that depends on the images is kept or added to the loss, as BatchNorm's
    statistics are; of layers that are not Keras's nobody knows.
    """
    return all(
        _known(type(layer))
        and not isinstance(layer, keras.layers.Lambda)
        and _known(vars(layer).get("activation"))
        and getattr(layer, "activity_regularizer", None) is None
        and (not _tells_training(layer) or isinstance(layer, (*_RANDOM, keras.Model)))
        for layer in layers
    )


def _known(part):
    """Whether it is nothing, or of Keras or this package."""
    module = part.__module__ if hasattr(part, "__module__") else ""
    return part is None or module.split(".")[0] in ("keras", "keras_emr")


def _tells_training(layer):
    """Whether it, or a layer inside it (as an activation is), does other things in training."""
    if type(layer) is keras.layers.Dense and layer.quantization_mode is not None:
        return True
    return any(_takes_training(type(inner)) for inner in layer._flatten_layers())


@functools.cache
def _takes_training(kind):
    # A Dense layer looks at it only when it is quantized.
    return kind is not keras.layers.Dense and "training" in inspect.signature(kind.call).parameters


def remembered(layers):
    """Changes by which those of ``layers`` that do the same in training and in inference compute
    once what they are asked twice: called with the very same tensor, they give the first answer.

    Two passes then share the layers before the first dropout (or before the first operation of a
    functional model that is not a layer), and so do their derivatives.
    """
    return [
        (layer, "call", _remembering(layer.call)) for layer in layers if not _tells_training(layer)
    ]


def _remembering(call):
    asked = []  # with what was given, lest another tensor gets its identity

    def remembering(*args, **options):
        if any(value is not None for name, value in options.items() if name != "training"):
            return call(*args, **options)
        given = keras.tree.flatten(args)
        for before, answer in asked:
            if len(before) == len(given) and all(map(operator.is_, before, given)):
                return answer
        asked.append((given, call(*args, **options)))
        return asked[-1][1]

    return remembering


def _rectified(layer, parts):
    if "relu" not in parts:
        return []
    kind, slope = type(layer), getattr(layer, "negative_slope", None)
    if kind is keras.layers.ReLU and layer.max_value is None and not (slope or layer.threshold):
        return [(layer, "call", lambda inputs: parts["relu"](inputs))]
    if kind is keras.layers.LeakyReLU:
        return [(layer, "call", lambda inputs: parts["leaky_relu"](inputs, slope))]
    if vars(layer).get("activation") is keras.activations.relu:  # a property cannot be set
        return [(layer, "activation", _relu(parts["relu"]))]
    return []


def _relu(plain):
    """``keras.activations.relu``, ``plain`` where no option is given."""

    def relu(x, *args, **options):
        return keras.activations.relu(x, *args, **options) if args or options else plain(x)

    return relu


def _pooled(layer, parts):
    """Max pooling whose windows do not overlap, as nearly all of a classifier's."""
    if type(layer) is not keras.layers.MaxPooling2D or "max_pool" not in parts:
        return []
    size, strides = tuple(layer.pool_size), tuple(layer.strides)
    if size != strides or layer.padding != "valid" or layer.data_format != "channels_last":
        return []
    return [(layer, "call", lambda inputs: parts["max_pool"](inputs, size))]


def plain_convolution(layer):
    """Whether it is a convolution as ``backend.cheaper`` knows it."""
    return (
        type(layer) is keras.layers.Conv2D
        and layer.data_format == "channels_last"
        and layer.groups == 1
        and set(layer.dilation_rate) == {1}
    )


def _convolved(layer, parts, constant):
    if "conv" not in parts or not plain_convolution(layer):
        return []

    arrange, kept = parts.get("arranged"), []

    def arranged(kernel):
        if arrange is None:
            return kernel
        if not (constant and kept and kept[0] is kernel):
            kept[:] = kernel, arrange(kernel)
        return kept[1]

    def call(inputs):
        kernel = arranged(keras.ops.convert_to_tensor(layer.kernel))
        bias = keras.ops.convert_to_tensor(layer.bias) if layer.use_bias else None
        out = parts["conv"](inputs, kernel, bias, tuple(layer.strides), layer.padding)
        return out if layer.activation is None else layer.activation(out)

    return [(layer, "call", call)]


def batch_norm_of_maps(layer):
    """Whether it is Keras's BatchNorm of the channels of maps."""
    return (
        type(layer) is keras.layers.BatchNormalization
        and layer.axis in (-1, 3)
        and layer.input_spec is not None
        and layer.input_spec.ndim == 4
    )


def _normalized(layer, parts):
    if "batch_norm" not in parts or not batch_norm_of_maps(layer):
        return []
    if layer.renorm or layer.synchronized or layer.variable_dtype != "float32":
        return []
    own = layer.call

    def call(inputs, training=None, mask=None):
        training = bool(training and layer.trainable)
        if mask is not None or keras.backend.standardize_dtype(inputs.dtype) == "float64":
            return own(inputs, training=training, mask=mask)
        x = keras.ops.cast(inputs, "float32")  # as Keras does, also where layers are narrower
        scale, offset, mean, variance = (
            None if v is None else keras.ops.convert_to_tensor(v)
            for v in (layer.gamma, layer.beta, layer.moving_mean, layer.moving_variance)
        )
        y, *found = parts["batch_norm"](x, scale, offset, mean, variance, layer.epsilon, training)
        if training:
            keep, new_mean, new_variance = layer.momentum, *found
            layer.moving_mean.assign(mean * keep + new_mean * (1.0 - keep))
            layer.moving_variance.assign(variance * keep + new_variance * (1.0 - keep))
        return keras.ops.cast(y, layer.compute_dtype)

    return [(layer, "call", call)]
