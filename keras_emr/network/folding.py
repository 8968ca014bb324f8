"""Convolutions that take in the BatchNorm after them, for passes with constant weights."""

from __future__ import annotations

from collections import Counter, defaultdict

import keras
from keras import ops

from keras_emr import backend
from keras_emr.network.inference import graph_of
from keras_emr.network.substitution import batch_norm_of_maps, plain_convolution

_LINEAR = keras.activations.linear


def normalized(model):
    """Pairs ``(convolution, BatchNorm)`` of a functional or sequential ``model``, and of such
    models in it, that are one convolution at inference: nothing else is made of what is between.
    """
    nodes, pairs = [], []
    for network in _networks(model):
        own = [node for depth in network._nodes_by_depth.values() for node in depth]
        nodes += own
        pairs += _neighbours(own, {id(tensor) for tensor in network.outputs})
    uses = Counter(id(node.operation) for node in nodes)
    return [pair for pair in pairs if all(uses[id(layer)] == 1 for layer in pair)]


def _networks(model):
    """``model`` and the models in it, each once; none unless all that is run is in their graphs."""
    found, ahead = [], [model]
    while ahead:
        network = graph_of(ahead.pop())
        if network is not None and not any(network is other for other in found):
            found.append(network)
            ahead += network.operations
    return found


def _neighbours(nodes, outputs):
    readers = defaultdict(list)
    for node in nodes:
        for tensor in node.input_tensors:
            readers[id(tensor)].append(node.operation)
    for node in nodes:
        if plain_convolution(node.operation) and node.operation.activation is _LINEAR:
            convolution, between = node.operation, id(node.outputs[0])
            if len(readers[between]) == 1 and between not in outputs:
                (norm,) = readers[between]
                if batch_norm_of_maps(norm) and norm.variable_dtype == convolution.variable_dtype:
                    yield convolution, norm


def folded(pairs, compute="float32"):
    """Changes by which each pair is one convolution, with the weights and statistics of now.

    ``gamma (conv(x) + b - mean) / sqrt(variance + epsilon) + beta`` is a convolution with scaled
    kernel and another bias. In an attack it is computed in every step, and scaled once.

    Args:
        pairs: of :func:`normalized`.
        compute: precision of the layers, ``float32`` or ``bfloat16``.
    """
    found = []
    for convolution, norm in pairs:
        scale = ops.rsqrt(norm.moving_variance + norm.epsilon)
        if norm.scale:
            scale = scale * norm.gamma
        bias = -scale * norm.moving_mean
        if convolution.use_bias:
            bias = bias + scale * convolution.bias
        if norm.center:
            bias = bias + norm.beta
        kernel = convolution.kernel * scale
        if convolution.variable_dtype == "float32":  # whatever is wider stays so
            kernel, bias = ops.cast(kernel, compute), ops.cast(bias, compute)
        kernel, bias = ops.stop_gradient(kernel), ops.stop_gradient(bias)
        found += [
            (convolution, "call", _convolution(convolution, kernel, bias)),
            (norm, "call", lambda inputs, training=None, mask=None: inputs),
        ]
    return found


def _convolution(layer, kernel, bias):
    parts = backend.cheaper(False)
    strides, padding = tuple(layer.strides), layer.padding
    if "conv" not in parts:
        return lambda x: ops.conv(x, kernel, strides, padding, layer.data_format) + bias
    arranged = parts["arranged"](kernel) if "arranged" in parts else kernel
    return lambda x: parts["conv"](x, arranged, bias, strides, padding)
