"""NumPy float64 references, written from the formulas alone, and small model builders.

Nothing here imports ``keras_emr``. ``y`` (N,), logits (N, K), images (N, H, W, C), results (N,).
"""

import itertools
import math

import keras
import numpy as np
from keras import ops

# ---------------------------------------------------------------- losses


def log_softmax(z):
    shifted = z - z.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def softmax(z):
    return np.exp(log_softmax(z))


def at(values, y):
    return values[np.arange(len(y)), y]


def strongest_rival(values, y):
    """Largest entry that is not ``y``."""
    others = values.astype(float).copy()
    others[np.arange(len(y)), y] = -np.inf
    return others.max(-1)


def cross_entropy(y, z):
    return -at(log_softmax(z), y)


def kl(reference, other):
    """``sum_k p_k (log p_k - log q_k)``, ``p`` from the first argument."""
    return (softmax(reference) * (log_softmax(reference) - log_softmax(other))).sum(-1)


def boosted(y, adversarial):
    rival = strongest_rival(softmax(adversarial), y)
    return cross_entropy(y, adversarial) - np.log(1.0001 - rival + 1e-12)


def mart_weight(y, clean):
    return 1.0000001 - at(softmax(clean), y)


def weighted_kl(y, clean, adversarial, weight=None):
    weight = mart_weight(y, clean) if weight is None else weight
    q = softmax(adversarial)
    return weight * (softmax(clean) * (log_softmax(clean) - np.log(q + 1e-12))).sum(-1)


def omega(
    y, clean, adversarial, slope, bias, margin="adversarial", normalization="constant", constant=3.0
):
    """MAIL's instance weights."""
    p, q = softmax(clean), softmax(adversarial)
    pm = {
        "adversarial": at(q, y) - strongest_rival(q, y),
        "natural": at(p, y) - strongest_rival(p, y),
        "difference": at(p, y) - strongest_rival(q, y),
    }[margin]
    w = 1 / (1 + np.exp(slope * (pm - bias)))
    return constant * w if normalization == "constant" else len(w) * w / w.sum()


def loss(name, y, clean, adversarial, beta, weights=1.0, weight=None):
    """Outer loss of a defense; ``weights``: MAIL's omega, ``weight``: MART's, if frozen."""
    if name == "standard":
        return cross_entropy(y, clean)
    if name in ("at", "mail-at"):
        return weights * cross_entropy(y, adversarial)
    if name in ("trades", "mail-trades"):
        return cross_entropy(y, clean) + beta * weights * kl(clean, adversarial)
    return weights * boosted(y, adversarial) + beta * weighted_kl(y, clean, adversarial, weight)


# ---------------------------------------------------------------- gradients


def finite_difference(fn, array, h=1e-5):
    """Central difference of the scalar ``fn(array)`` in every entry."""
    gradient = np.zeros(array.shape)
    for index in np.ndindex(array.shape):
        step = np.zeros(array.shape)
        step[index] = h
        gradient[index] = (fn(array + step) - fn(array - step)) / (2 * h)
    return gradient


def tensor(array, dtype="float64"):
    return ops.convert_to_tensor(np.asarray(array), dtype=dtype)


def numpy(value):
    return np.asarray(ops.convert_to_numpy(value))


def gradients(fn, *arrays):
    """Backend gradients of the scalar ``fn(*tensors)`` with respect to float64 ``arrays``."""
    backend = keras.backend.backend()
    if backend == "jax":
        import jax

        out = jax.grad(fn, argnums=tuple(range(len(arrays))))(*map(tensor, arrays))
    elif backend == "tensorflow":
        import tensorflow as tf

        inputs = [tensor(a) for a in arrays]
        with tf.GradientTape() as tape:
            for t in inputs:
                tape.watch(t)
            value = fn(*inputs)
        out = tape.gradient(value, inputs, unconnected_gradients="zero")
    else:
        import torch

        inputs = [tensor(a).requires_grad_(True) for a in arrays]
        out = torch.autograd.grad(fn(*inputs), inputs, allow_unused=True)
        out = [torch.zeros_like(t) if g is None else g for g, t in zip(out, inputs, strict=True)]
    return [numpy(g) for g in out]


def weight_gradients(model, fn):
    """Backend gradients of the scalar ``fn()`` with respect to the weights of ``model``."""
    variables = model.trainable_variables
    backend = keras.backend.backend()
    if backend == "jax":
        import jax

        def value(values):
            with keras.StatelessScope(state_mapping=list(zip(variables, values, strict=True))):
                return fn()

        out = jax.grad(value)([v.value for v in variables])
    elif backend == "tensorflow":
        import tensorflow as tf

        with tf.GradientTape() as tape:
            value = fn()
        out = tape.gradient(value, [v.value for v in variables], unconnected_gradients="zero")
    else:
        import torch

        values = [v.value for v in variables]
        out = torch.autograd.grad(fn(), values, allow_unused=True)
        out = [torch.zeros_like(v) if g is None else g for g, v in zip(out, values, strict=True)]
    return [numpy(g) for g in out]


# ---------------------------------------------------------------- networks


def _normal_cdf(a):
    return np.vectorize(math.erfc)(-a / math.sqrt(2)) / 2


# name -> (activation, derivative)
ACTIVATIONS = {
    "tanh": (np.tanh, lambda a: 1 - np.tanh(a) ** 2),
    "softplus": (lambda a: np.logaddexp(0, a), lambda a: 1 / (1 + np.exp(-a))),
    "relu": (lambda a: np.maximum(a, 0), lambda a: (a > 0).astype(float)),
    "gelu": (
        lambda a: a * _normal_cdf(a),
        lambda a: _normal_cdf(a) + a * np.exp(-(a**2) / 2) / math.sqrt(2 * math.pi),
    ),
}


def mlp_weights(rng, *sizes, scale=1.5):
    """Kernels (in, out) and biases, alternating."""
    pairs = itertools.pairwise(sizes)
    shapes = [shape for pair in pairs for shape in (pair, pair[1:])]
    return [rng.normal(size=s) * scale / math.sqrt(s[0]) for s in shapes]


def mlp_forward(weights, activation, x):
    """Logits (N, K), input Jacobian (N, K, D), and the hidden pre-activations."""
    act, slope = ACTIVATIONS[activation]
    h = x.reshape(len(x), -1)
    jacobian = np.broadcast_to(np.eye(h.shape[1]), (len(x), h.shape[1], h.shape[1]))
    hidden = []
    for i in range(0, len(weights), 2):
        a = h @ weights[i] + weights[i + 1]
        jacobian = np.einsum("io,nid->nod", weights[i], jacobian)
        if i == len(weights) - 2:
            return a, jacobian, hidden
        h, jacobian = act(a), slope(a)[:, :, None] * jacobian
        hidden.append(a)


def _native_activation(name):
    """The backend's own function: Keras's run in float32 on JAX, whatever their input."""
    backend = keras.backend.backend()
    if backend == "jax":
        import jax

        return {"gelu": lambda a: jax.nn.gelu(a, approximate=False)}.get(
            name, getattr(jax.nn, name)
        )
    if backend == "tensorflow":
        import tensorflow as tf

        return getattr(tf.nn, name)
    import torch

    return torch.tanh if name == "tanh" else getattr(torch.nn.functional, name)


class Affine(keras.layers.Layer):
    """Dense layer that stays in float64 on every backend (Keras's own does not on torch)."""

    def __init__(self, units, activation, **kwargs):
        super().__init__(**kwargs)
        self.units, self.activation = units, activation

    def build(self, shape):
        self.kernel = self.add_weight(shape=(shape[-1], self.units))
        self.bias = self.add_weight(shape=(self.units,))

    def compute_output_shape(self, shape):
        return (shape[0], self.units)

    def call(self, x):
        a = x @ ops.convert_to_tensor(self.kernel) + ops.convert_to_tensor(self.bias)
        return _native_activation(self.activation)(a) if self.activation else a


def build_mlp(weights, activation="tanh", shape=(2, 2, 1), dtype="float64"):
    """The same network in Keras; a linear model if there is one kernel."""
    dense = Affine if dtype == "float64" else keras.layers.Dense
    layers = [keras.Input(shape, dtype=dtype), keras.layers.Flatten(dtype=dtype)]
    for i in range(0, len(weights), 2):
        act = None if i == len(weights) - 2 else activation
        layers.append(dense(weights[i].shape[1], activation=act, dtype=dtype))
    model = keras.Sequential(layers)
    model.set_weights(weights)
    return model


# ---------------------------------------------------------------- EMR


def cotangent(weighting, z, y, temperature=1.0):
    """The deterministic rows ``c`` (N, K)."""
    n, k = z.shape
    if weighting == "softmax":
        return softmax(z / temperature)
    if weighting == "uniform":
        return np.full((n, k), 1 / k)
    if weighting == "predicted":
        return np.eye(k)[z.argmax(-1)]
    if weighting == "true":
        return np.eye(k)[y]
    assert weighting == "runner_up_difference"
    others = z.copy()
    others[np.arange(n), y] = -np.inf
    return np.eye(k)[y] - np.eye(k)[others.argmax(-1)]


def vector_norm(g, norm):
    g = g.reshape(len(g), -1)
    if norm == "l2":
        return np.sqrt((g**2).sum(-1))
    return np.abs(g).sum(-1) if norm == "l1" else np.abs(g).max(-1)


def penalty(jacobian, c, norm="l2", power=2):
    """``||J^T c||^power`` per example; ``c=None``: of every row, summed (``exact``)."""
    if c is None:
        return sum(vector_norm(jacobian[:, k], norm) ** power for k in range(jacobian.shape[1]))
    return vector_norm(np.einsum("nk,nkd->nd", c, jacobian), norm) ** power
