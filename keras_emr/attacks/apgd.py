"""Auto-PGD (Croce and Hein, ICML 2020)."""

import copy
from typing import Any, NamedTuple

import numpy as np
from keras import ops

from keras_emr.attacks import starts
from keras_emr.attacks.base import Attack
from keras_emr.backend import clip
from keras_emr.errors import UserError
from keras_emr.geometry import norm as norm_of
from keras_emr.geometry import per_example, project
from keras_emr.part import non_negative, one_of, register, whole

_MOMENTUM = 0.75
_TINY = 1e-12
KEEPS = ("best_loss", "fooled")


def windows(steps):
    """Lengths of the windows between two checks of the step size, for ``steps`` iterations.

    The first lasts ``max(int(0.22 n), 1)`` iterations and each following one
    ``max(int(0.03 n), 1)`` fewer, but at least ``max(int(0.06 n), 1)``. A window that ``steps``
    cuts short is left out: it has no check.
    """
    length = max(int(0.22 * steps), 1)
    shortest, shorter = max(int(0.06 * steps), 1), max(int(0.03 * steps), 1)
    lengths = []
    while sum(lengths) + length <= steps:
        lengths.append(length)
        length = max(length - shorter, shortest)
    return lengths


class State(NamedTuple):
    """State of a run. Images have shape (N, H, W, C); all else (N,) unless stated."""

    x: Any  # where the next step starts
    previous: Any  # where the last step started
    gradient: Any  # at ``x``
    best: Any  # image with the highest objective so far
    best_gradient: Any
    best_value: Any
    value: Any  # objective at the newest iterate
    fooling: Any  # newest misclassified iterate, if there is one
    fooled: Any  # bool: there is one
    size: Any  # step size
    rises: Any  # int: iterations of this window that raised the objective
    reduced: Any  # bool: the last check halved the step size
    checked_value: Any  # ``best_value`` at the last check
    limits: Any  # (steps,) int: see :meth:`APGD._limits`
    index: Any  # () int: iterations done


@register
class APGD(Attack):
    """Auto-PGD in the Linf or L2 ball: PGD with momentum that sets its own step size.

    From ``x_i``, with ``Pi`` the projection onto ball and box and ``s`` the direction of steepest
    ascent (``sign(g)`` or ``g / ||g||_2``)::

        v = Pi(x_i + size * s)
        x_{i+1} = Pi(x_i + 0.75 (v - x_i) + 0.25 (x_i - x_{i-1}))     (x_1 = v)

    The step size of every example begins at ``2 epsilon``. At the end of each window
    (:func:`windows`) it is halved, and the example goes back to its best image, if at most
    ``rho`` times the window's length of the window's iterations raised the objective over the
    iteration before, or if the last check did not halve it and the best objective has not risen
    since. The momentum term is left as it was. Only a strictly higher objective is "best".

    As in the authors' code, the first iteration is compared with 0 and not with the objective at
    the start: with an objective that is never negative (``cross_entropy``, ``kl``) it nearly
    always counts as a rise, with one that is never positive (``margin``, ``probability``) never.

    Args:
        epsilon, norm, restarts: see :class:`Attack`.
        steps: iterations, >= 1. 100 is the paper's evaluation; in training give fewer, e.g. 10.
            Each costs one input gradient, the start one more.
        start: as in :class:`Attack`, but ``uniform`` is the paper's start on the sphere and not
            in the ball: uniform noise scaled to ``max |u| = epsilon`` (Linf) or Gaussian noise
            scaled to ``||u||_2 = epsilon`` (L2), clipped to [0, 1]. ``gaussian`` is projected
            here, as the start may be what is returned.
        objective: see :class:`Attack`.
        rho: share of rises, in [0, 1].
        keep: what is returned: ``best_loss``, the image with the highest objective, or
            ``fooled``, the newest misclassified iterate of an example that has one (and else
            ``best_loss``): with three classes or more a lower cross-entropy can be a
            misclassification where a higher one is not. ``None``: ``best_loss`` where the attack
            is called inside a compiled step, as in training and in the validation of ``fit``,
            ``fooled`` in ``evaluate_attack``.
        eot: passes per gradient of a random model, in evaluation: see :class:`Objective`.
    """

    name = "apgd"

    def __init__(
        self,
        epsilon,
        norm="linf",
        steps=100,
        start=None,
        restarts=1,
        objective=None,
        rho=0.75,
        keep=None,
        eot=1,
    ):
        super().__init__(epsilon, norm, steps, start, restarts, objective)
        self.eot = whole("eot", eot, 1)
        self.rho = non_negative("rho", rho)
        if self.rho > 1:
            raise UserError(f"rho must be in [0, 1]. Received: {rho!r}.")
        self.keep = one_of("keep", keep, (None, *KEEPS))

    @property
    def alpha(self):
        """The initial step size."""
        return 2 * self.epsilon

    def _limits(self):
        """Most rises at which the window that an iteration ends halves the step size; else -1."""
        limits = np.full(self.steps, -1, "int32")
        ends = np.cumsum(windows(self.steps)) - 1
        limits[ends] = [int(self.rho * length) for length in windows(self.steps)]
        return limits

    def draw(self, x, sampler, classes=None):
        if self.start not in (None, "uniform"):
            return super().draw(x, sampler, classes)
        noise = sampler.uniform if self.norm == "linf" else sampler.normal
        return (noise(ops.shape(x)),)

    def _first_image(self, objective, x, drawn):
        if self.start in (None, "uniform"):
            noise = drawn[0]
            length = per_example(norm_of(noise, self.norm), noise) + _TINY
            return clip(x + self.epsilon * noise / length, 0.0, 1.0)
        image = starts.first_image(self.start, objective, x, drawn, self.epsilon, self.norm)
        return project(image, x, self.epsilon, self.norm)

    def begin(self, objective, x, drawn):
        image = self._first_image(objective, x, drawn)
        value, right, gradient = objective.look(image)
        return State(
            x=image,
            previous=image,
            gradient=gradient,
            best=image,
            best_gradient=gradient,
            best_value=value,
            value=ops.zeros_like(value),
            fooling=image,
            fooled=~right,
            size=ops.cast(ops.zeros_like(value), image.dtype) + self.alpha,
            rises=ops.cast(ops.zeros_like(value), "int32"),
            reduced=ops.ones_like(right),
            checked_value=value,
            # In the state, so that no step sends it to the device again.
            limits=ops.convert_to_tensor(self._limits()),
            index=ops.zeros((), dtype="int32"),
        )

    def _direction(self, gradient):
        if self.norm == "linf":
            return ops.sign(gradient)
        return gradient / (per_example(norm_of(gradient, "l2"), gradient) + _TINY)

    def step(self, objective, x, state):
        s = state
        image = self._move(x, s)
        value, right, gradient = objective.look(image)

        better = value > s.best_value
        best = _choose(better, image, s.best)
        best_gradient = _choose(better, gradient, s.best_gradient)
        best_value = ops.where(better, value, s.best_value)

        rises = s.rises + ops.cast(value > s.value, "int32")
        limit = ops.take(s.limits, s.index)
        check = limit >= 0
        stale = ~s.reduced & (s.checked_value >= best_value)
        halve = check & ((rises <= limit) | stale)
        return State(
            x=_choose(halve, best, image),
            previous=s.x,
            gradient=_choose(halve, best_gradient, gradient),
            best=best,
            best_gradient=best_gradient,
            best_value=best_value,
            value=value,
            fooling=_choose(right, s.fooling, image),
            fooled=s.fooled | ~right,
            size=ops.where(halve, s.size / 2, s.size),
            rises=ops.where(check, ops.zeros_like(rises), rises),
            reduced=ops.where(check, halve, s.reduced),
            checked_value=ops.where(check, best_value, s.checked_value),
            limits=s.limits,
            index=s.index + 1,
        )

    def _move(self, x, s):
        """The next iterate."""
        moved = s.x + per_example(s.size, x) * self._direction(s.gradient)
        moved = project(moved, x, self.epsilon, self.norm)
        share = ops.cast(ops.where(s.index == 0, 1.0, _MOMENTUM), x.dtype)
        moved = s.x + share * (moved - s.x) + (1 - share) * (s.x - s.previous)
        return project(moved, x, self.epsilon, self.norm)

    def result(self, state):
        if self.keep == "best_loss":
            return state.best
        return _choose(state.fooled, state.fooling, state.best)

    def __call__(self, objective, x, sampler, classes=None):
        attack = copy.copy(self)
        attack.keep = self.keep or "best_loss"
        return super(APGD, attack).__call__(objective, x, sampler, classes)


def _choose(condition, yes, no):
    """Per example: the image of ``yes`` or of ``no``; ``condition`` (N,) bool."""
    return ops.where(per_example(condition, yes), yes, no)
