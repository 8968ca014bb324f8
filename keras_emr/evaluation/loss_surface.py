"""The loss around an image: over the gradient's sign and a random direction."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from keras import ops

from keras_emr import backend, losses
from keras_emr.errors import UserError
from keras_emr.evaluation.batching import in_batches
from keras_emr.evaluation.inputs import checked_examples, require_finite
from keras_emr.network import Network
from keras_emr.part import whole
from keras_emr.sampling import ExampleSampler

_STREAM = 2**16  # of the random directions: no restart of an attack uses it


@dataclass(frozen=True)
class LossSurface:
    """``loss[i, j] = F(a[i], b[j])``, the mean over the examples, in nats.

    ``a`` and ``b``: (P,) distances along the gradient's sign and the random direction, in units
    of [0, 1] images, from ``-epsilon`` to ``epsilon``; the middle one is 0.
    """

    a: np.ndarray
    b: np.ndarray
    loss: np.ndarray


def loss_surface(model, x, y, epsilon, *, points=21, index=None, seed=0, batch_size=256):
    """Cross-entropy over a plane through each image, averaged over the images.

    ``F(a, b) = CE(f(clip(x + a sign(grad_x CE(f(x), y)) + b r, 0, 1)), y)`` with
    ``a, b in [-epsilon, epsilon]`` and ``r`` Rademacher: every entry +1 or -1 with probability
    1/2, fixed by (seed, the example's index). Points are clipped to [0, 1]. The corners are
    ``2 epsilon`` from the image where both directions agree, so outside the Linf ball.
    The two directions are those of Engstrom et al. (arXiv 1807.10272).

    Args:
        model: Keras classifier to logits.
        x: (N, H, W, C) images in [0, 1].
        y: (N,) integer labels.
        epsilon: half the side of the square, > 0.
        points: P per side, odd, >= 3.
        index: (N,) the examples' indices in their data set; ``None``: 0, 1, ...
        seed: of ``r``.
        batch_size: grid points at a time.

    Returns:
        :class:`LossSurface`.

    Raises:
        UserError: a bad epsilon or number of points; images, labels or logits that mean nothing.
    """
    if not 0 < epsilon < float("inf"):
        raise UserError(f"epsilon must be a number > 0. Received: {epsilon!r}.")
    if whole("points", points, 3) % 2 == 0:
        raise UserError(f"points must be odd, so that the image is one. Received: {points!r}.")
    network = Network(model)
    x, y = checked_examples(x, y, network.classes)
    index = np.arange(len(x)) if index is None else np.asarray(index)

    def gradient_sign(x, y):
        def value(x):
            logits = network.frozen()(x)
            return losses.cross_entropy(y, logits), ops.all(ops.isfinite(logits), axis=-1)

        _, finite, gradient = backend.value_and_grad(value, x)
        return ops.sign(gradient), finite

    def at_points(x, sign, direction, y, a, b):
        shape = (-1,) + (1,) * (len(x.shape) - 1)
        moved = x + ops.reshape(a, shape) * sign + ops.reshape(b, shape) * direction
        logits = network.frozen()(ops.clip(moved, 0.0, 1.0))
        return losses.cross_entropy(ops.repeat(y, a.shape[0]), logits)

    find_sign = backend.compiled(gradient_sign, model.variables)
    find_loss = backend.compiled(at_points, model.variables)
    axis = np.linspace(-epsilon, epsilon, points)
    axis[points // 2] = 0.0
    a, b = (side.ravel().astype(x.dtype) for side in np.meshgrid(axis, axis, indexing="ij"))
    size = min(batch_size, len(a))
    total = np.zeros(points * points)
    for i in range(len(x)):
        image, label = (ops.convert_to_tensor(part[i : i + 1]) for part in (x, y))
        sign, finite = find_sign(image, label)
        require_finite(ops.convert_to_numpy(finite))
        uniform = ExampleSampler(seed, _STREAM, index[i : i + 1]).uniform(image.shape)
        direction = ops.where(uniform < 0, -ops.ones_like(uniform), ops.ones_like(uniform))

        def batch(a, b, part=(image, sign, direction, label)):
            return (find_loss(*part, a, b),)

        (loss,) = in_batches(batch, size, a, b)
        total += loss.astype("float64")
    return LossSurface(axis, axis.copy(), (total / len(x)).reshape(points, points))
