"""Norms, projections and steepest-ascent steps of the threat models, per example.

Images are (N, ...); a norm has shape (N,).
"""

from keras import ops

from keras_emr.backend import clip

NORMS = ("linf", "l2")


def per_example(values, like):
    """(N,) values reshaped to broadcast against ``like`` (N, ...)."""
    return ops.reshape(values, (-1,) + (1,) * (len(like.shape) - 1))


def norm(delta, kind):
    """Per-example norm of ``delta``: ``linf``, ``l2`` or ``l1``."""
    axes = tuple(range(1, len(delta.shape)))
    if kind == "linf":
        return ops.max(ops.abs(delta), axis=axes)
    if kind == "l1":
        return ops.sum(ops.abs(delta), axis=axes)
    return ops.sqrt(ops.sum(ops.square(delta), axis=axes))


def ascent(gradient, kind):
    """Steepest-ascent direction of length one: ``sign(g)`` (linf) or ``g / (||g||_2 + 1e-10)``."""
    if kind == "linf":
        return ops.sign(gradient)
    return gradient / (per_example(norm(gradient, "l2"), gradient) + 1e-10)


def shrink(delta, epsilon):
    """``delta`` scaled, per example, into the L2 ball of radius ``epsilon``."""
    length = norm(delta, "l2")
    if len(getattr(epsilon, "shape", ())) > 1:
        epsilon = ops.reshape(epsilon, (-1,))
    scale = ops.where(length > epsilon, epsilon / ops.maximum(length, 1e-30), ops.ones_like(length))
    return delta * per_example(scale, delta)


def project(adversarial, x, epsilon, kind, box_first=False):
    """The feasible point for ``adversarial``: within ``epsilon`` of ``x`` and in [0, 1].

    Ball first, then box, unless ``box_first`` (TRADES, L2). ``x`` lies in the box, so neither
    order leaves the other set. ``epsilon``: a number, or one for each example, (N,) or shaped to
    broadcast against ``x``.
    """
    if kind == "linf":
        if len(getattr(epsilon, "shape", ())) == 1:
            epsilon = per_example(epsilon, x)
        # Not `maximum(., 0.0)`: on torch that narrows float64.
        low, high = clip(x - epsilon, 0.0, 1.0), clip(x + epsilon, 0.0, 1.0)
        return ops.minimum(ops.maximum(adversarial, low), high)
    if box_first:
        return x + shrink(clip(adversarial, 0.0, 1.0) - x, epsilon)
    return clip(x + shrink(adversarial - x, epsilon), 0.0, 1.0)
