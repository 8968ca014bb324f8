"""What a recurrent maximizer sees of an input gradient, per coordinate and per example.

A preprocessing maps a gradient (N, H, W, C) of the *summed* objective to a list of features, each
of that shape. None mixes examples: a batch mate must not change an example's attack.
"""

import math

from keras import ops

PREPROCESSINGS = ("rms", "sign", "raw", "max_abs", "log_sign", "adam_ratio")
FEATURES = {name: 2 if name in ("log_sign", "adam_ratio") else 1 for name in PREPROCESSINGS}
_LOG_RANGE = 10.0  # p of the log-sign pair
_DECAY = 0.95  # of the running moments of the Adam ratio


def initial_state(kind, x):
    """Running moments for ``adam_ratio``: first, second, share of the past; else nothing."""
    if kind != "adam_ratio":
        return ()
    return ops.zeros_like(x), ops.zeros_like(x), ops.ones_like(x[:1, :1, :1, :1])


def preprocess(kind, gradient, state):
    """``(features, state)``; every gradient of exactly zero gives zeros, except in ``log_sign``.

    * ``rms``: ``g / sqrt(mean_j g_j^2)`` per example;
    * ``sign``: ``sign(g)``, what PGD sees;
    * ``raw``: ``g``;
    * ``max_abs``: ``g / max_j |g_j|`` per example;
    * ``log_sign``: ``(log|g| / 10, sign g)`` where ``|g| >= e^-10``, else ``(-1, e^10 g)``
      (Andrychowicz et al., NeurIPS 2016);
    * ``adam_ratio``: ``(m / sqrt(v), g / sqrt(v))`` with bias-corrected running moments
      (RNNprop, Lv et al., ICML 2017; the decay 0.95 is as others recall it).
    """
    if kind == "raw":
        return [gradient], state
    if kind == "sign":
        return [ops.sign(gradient)], state
    if kind == "log_sign":
        size = ops.abs(gradient)
        large = size >= math.exp(-_LOG_RANGE)
        logarithm = ops.log(ops.maximum(size, math.exp(-_LOG_RANGE))) / _LOG_RANGE
        low = math.exp(_LOG_RANGE) * gradient
        return [logarithm, ops.where(large, ops.sign(gradient), low)], state
    # Relative to the largest entry: squares of tiny gradients would underflow.
    axes = tuple(range(1, len(gradient.shape)))
    if kind == "adam_ratio":
        return _adam_ratio(gradient, state)
    largest = ops.max(ops.abs(gradient), axis=axes, keepdims=True)
    relative = gradient / ops.where(largest > 0, largest, ops.ones_like(largest))
    if kind == "max_abs":
        return [relative], state
    mean_square = ops.mean(ops.square(relative), axis=axes, keepdims=True)
    return [relative / ops.sqrt(ops.where(largest > 0, mean_square, ops.ones_like(largest)))], state


def _adam_ratio(gradient, state):
    first, second, past = state
    first = _DECAY * first + (1 - _DECAY) * gradient
    second = _DECAY * second + (1 - _DECAY) * ops.square(gradient)
    past = _DECAY * past
    some = second > 0
    root = ops.sqrt(ops.where(some, second, ops.ones_like(second)) / (1 - past))
    ratios = [first / (1 - past) / root, gradient / root]
    return [ops.where(some, ratio, ops.zeros_like(ratio)) for ratio in ratios], (
        first,
        second,
        past,
    )
