"""Linearised decision boundaries, and the way to one of them inside the box [0, 1]."""

import math

from keras import ops

from keras_emr import backend, losses
from keras_emr.geometry import norm as norm_of
from keras_emr.geometry import per_example

# The norm that measures gradients where perturbations are measured in this one.
DUAL = {"linf": "l1", "l2": "l2"}
# Each iteration divides (rest to go) x (slope) by at least four, and in practice 24 reached the
# exact multiplier of a thousand-pixel image with weights over eight orders of magnitude.
_ITERATIONS = 20
_FLAT = 1e-8


def survey(objective, x):
    """What a search begins with: rivals and the distances known, ``(rivals, distance)``.

    ``rivals``: (N, K - 1) int32, the classes other than the label, in falling order of their
    logits at ``x``. ``distance``: (N,), zero where ``x`` itself is misclassified, else ``inf``.
    """
    logits = ops.stop_gradient(objective.logits(x))
    others = ops.where(losses.one_hot(objective.y, logits) > 0, -float("inf"), logits)
    rivals = ops.cast(ops.argsort(-others, axis=-1), "int32")[:, : logits.shape[-1] - 1]
    right = losses.correct(objective.y, logits)
    far = ops.full_like(x[:, 0, 0, 0], float("inf"))
    return rivals, ops.where(right, far, ops.zeros_like(far))


def nearest_boundary(objective, image, rivals, norm, tiny):
    """The nearest of the linearised boundaries between the label and each rival class.

    With ``f_k = z_k - z_y`` and ``w_k`` its input gradient: the ``k`` with the smallest
    ``|f_k| / (||w_k||_q + tiny)``, ``q`` dual to ``norm``. One input gradient per rival.

    Args:
        rivals: (N, R) int32.

    Returns:
        ``f`` (N,), ``w`` in the shape of ``image`` and ``||w||_q`` (N,), of that rival.
    """
    logits, _, pullback = backend.vjp(lambda x: (objective.logits(x), ()), image)
    true = losses.one_hot(objective.y, logits)
    nearest = None
    for j in range(rivals.shape[-1]):
        difference = losses.one_hot(rivals[:, j], logits) - true
        f = ops.stop_gradient(ops.sum(difference * logits, axis=-1))
        w = ops.stop_gradient(pullback(difference))
        size = norm_of(w, DUAL[norm])
        ratio = ops.abs(f) / (size + tiny)
        if nearest is None:
            nearest = (f, w, size, ratio)
            continue
        closer = ratio < nearest[3]
        nearest = tuple(
            ops.where(per_example(closer, new), new, old)
            for new, old in zip((f, w, size, ratio), nearest, strict=True)
        )
    return nearest[:3]


def displacement(point, w, gap, norm):
    """The shortest way from points of the box to hyperplanes, without leaving the box.

    The smallest ``d`` in ``norm`` with ``<w, point + d> = b`` and ``point + d`` in [0, 1]; where
    the hyperplane misses the box, the way to the corner nearest to it. Pixels with ``w = 0``
    (L2: ``|w| < 1e-8``) stay.

    With the sign of ``w`` chosen so that ``gap >= 0``, pixels move against it: by
    ``min(lambda, room)`` (Linf) or ``min(lambda |w|, room)`` (L2), ``room`` being the distance to
    the wall. What that gains is concave and piecewise linear in ``lambda``; Newton's iteration
    finds its solution from below, exactly once the set of pixels at the wall is right.

    Args:
        point: (N, H, W, C) in [0, 1].
        w: normals, same shape.
        gap: (N,) ``<w, point> - b``.
        norm: ``linf`` or ``l2``.

    Source: the projection of FAB (Croce and Hein, ICML 2020); the solver is ours.
    """
    flat = (-1, math.prod(point.shape[1:]))
    shape, point, w = ops.shape(point), ops.reshape(point, flat), ops.reshape(w, flat)
    w = w * (1 - 2 * ops.cast(gap < 0, w.dtype))[:, None]
    gap, size, zero = ops.abs(gap), ops.abs(w), ops.zeros_like(w)
    room = ops.where(w < 0, 1 - point, point)
    if norm == "linf":
        moves, speed = size > 0, ops.ones_like(size)
    else:
        moves = size >= _FLAT
        speed = ops.where(moves, size, ops.ones_like(size))
    # In units of lambda: where a pixel meets the wall, and what it gains until then.
    wall, slope = room / speed, ops.where(moves, size * speed, zero)
    whole = slope * wall

    def newton(i, multiplier):
        free = multiplier[:, None] < wall
        rest = gap - ops.sum(ops.where(free, zero, whole), axis=-1)
        steepness = ops.sum(ops.where(free, slope, zero), axis=-1)
        some = steepness > 0
        guarded = ops.where(some, steepness, ops.ones_like(steepness))
        return ops.where(some, rest / guarded, multiplier)

    # Not `backend.loop`: that unrolls on JAX, which only takes longer to compile here.
    multiplier = ops.fori_loop(0, _ITERATIONS, newton, ops.zeros_like(gap))
    missed = gap >= ops.sum(whole, axis=-1)
    free = (multiplier[:, None] < wall) & ~missed[:, None]
    moved = ops.where(free, multiplier[:, None] * speed, room)
    return ops.reshape(ops.where(moves, -ops.sign(w) * moved, zero), shape)
