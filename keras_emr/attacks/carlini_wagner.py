"""The L2 attack of Carlini and Wagner (IEEE S&P 2017)."""

from typing import Any, NamedTuple

import numpy as np
from keras import ops

from keras_emr import backend, losses
from keras_emr.attacks.minimum_norm import MinimumNormAttack, nearer
from keras_emr.errors import UserError
from keras_emr.geometry import per_example
from keras_emr.part import non_negative, register, whole

_INSIDE = 0.999999
_BETA_1, _BETA_2, _TINY = 0.9, 0.999, 1e-8
# Above the second no c has succeeded yet.
_UPPER, _NO_UPPER = 1e10, 1e9
_PROGRESS = 0.9999
# From so many searches on, the last one takes the smallest c that has succeeded.
_REPEAT = 10


class State(NamedTuple):
    """State of a run. Images have shape (N, H, W, C); all else (N,) unless stated."""

    w: Any  # image: what Adam moves
    mean: Any  # image: Adam's first moment
    square: Any  # image: Adam's second moment
    c: Any  # weight of the margin
    lower: Any  # largest c that failed
    upper: Any  # smallest c that succeeded
    reached: Any  # bool: this search succeeded
    active: Any  # bool: this search goes on
    checked: Any  # loss at the last check
    best: Any  # nearest misclassified image, else ``x``
    distance: Any  # its distance, ``inf`` if there is none
    search: Any  # () int: searches done
    iteration: Any  # () int: iterations of this search done
    rates: Any  # (iterations,): Adam's step sizes with their bias corrections


@register
class CarliniWagner(MinimumNormAttack):
    """Carlini and Wagner's L2 attack: Adam in a space without walls, binary search for ``c``.

    ``x_adv = (tanh(t + w) + 1) / 2`` with ``t = atanh(0.999999 (2x - 1))``; from ``w = 0`` every
    search minimises, per example::

        ||x_adv - x_0||_2^2 + c max(0, z_y - max_{k != y} z_k + kappa),    x_0 = (tanh(t) + 1) / 2

    An iterate succeeds if it is misclassified even with ``kappa`` added to the label's logit.
    After a search with a success ``c`` becomes the mean of its bounds, without one ten times as
    large until a bound is known; from 10 searches on, the last one repeats the smallest ``c``
    that succeeded. The success nearest to ``x`` itself is returned.

    Ten times per search the loss is looked at: an example whose loss is above 0.9999 times that of
    the last time stands still until the next search. The authors' code does so with the loss of
    the whole batch and stops all of it; here no example depends on the others.

    Args:
        epsilon: see :class:`MinimumNormAttack`.
        norm: ``l2``.
        searches: values of ``c`` tried per example, >= 1.
        iterations: of each search, >= 1. The authors' code allows 10000. Every one costs one
            input gradient; there are ``searches * iterations`` in all, early stops included.
        learning_rate: Adam's (betas 0.9 and 0.999, epsilon 1e-8, reset for each search).
        initial_c: first ``c``, > 0.
        kappa: confidence, >= 0, in units of logits.
        restarts: independent runs, all of them alike: there are no random numbers.
    """

    name = "cw-l2"
    norms = ("l2",)

    def __init__(
        self,
        epsilon=None,
        norm="l2",
        searches=9,
        iterations=1000,
        learning_rate=0.01,
        initial_c=1e-3,
        kappa=0.0,
        restarts=1,
    ):
        self.searches = whole("searches", searches, 1)
        self.iterations = whole("iterations", iterations, 1)
        super().__init__(epsilon, norm, searches * iterations, restarts)
        self.learning_rate = non_negative("learning_rate", learning_rate)
        self.initial_c = non_negative("initial_c", initial_c)
        if self.initial_c == 0:
            raise UserError(f"initial_c must be above 0. Received: {initial_c!r}.")
        self.kappa = non_negative("kappa", kappa)

    def begin(self, objective, x, drawn):
        zeros = ops.zeros_like(x)
        rows = ops.zeros_like(x[:, 0, 0, 0])
        t = np.arange(1, self.iterations + 1)
        rates = self.learning_rate * np.sqrt(1 - _BETA_2**t) / (1 - _BETA_1**t)
        return State(
            w=zeros,
            mean=zeros,
            square=zeros,
            c=rows + self.initial_c,
            lower=rows,
            upper=rows + _UPPER,
            reached=rows > 0,
            active=rows == 0,
            checked=rows + float("inf"),
            best=x,
            distance=rows + float("inf"),
            search=ops.zeros((), dtype="int32"),
            iteration=ops.zeros((), dtype="int32"),
            rates=ops.cast(ops.convert_to_tensor(rates), x.dtype),
        )

    def _look(self, objective, x, state):
        """Loss (N,), ``(image, misclassified (N,))``, and the gradient in ``w``."""
        u = _INSIDE * (2 * x - 1)
        # (tanh(a) + 1) / 2 is the sigmoid of 2a; this is 2t.
        twice = ops.log((1 + u) / (1 - u))
        origin = ops.sigmoid(twice)
        axes = tuple(range(1, len(x.shape)))
        y = objective.y

        def loss(w):
            image = ops.sigmoid(twice + 2 * w)
            logits = losses.widen(objective.logits(image))
            lead = losses.pick(logits, y) - losses.pick(logits, losses.runner_up(logits, y))
            value = ops.sum(ops.square(image - origin), axis=axes)
            value = value + state.c * ops.relu(lead + self.kappa)
            handicap = self.kappa * losses.one_hot(y, logits)
            return value, (image, ~losses.correct(y, logits + handicap))

        return backend.value_and_grad(loss, state.w)

    def step(self, objective, x, state):
        s = state
        loss, (image, wrong), gradient = self._look(objective, x, s)
        best, distance = nearer(image, wrong, x, s.best, s.distance, "l2")

        check = ops.equal(ops.mod(s.iteration, max(self.iterations // 10, 1)), 0)
        active = s.active & ~(check & (loss > _PROGRESS * s.checked))
        mean = _BETA_1 * s.mean + (1 - _BETA_1) * gradient
        square = _BETA_2 * s.square + (1 - _BETA_2) * ops.square(gradient)
        moved = s.w - ops.take(s.rates, s.iteration) * mean / (ops.sqrt(square) + _TINY)
        state = s._replace(
            w=ops.where(per_example(active, moved), moved, s.w),
            mean=mean,
            square=square,
            reached=s.reached | wrong,
            active=active,
            checked=ops.where(check, loss, s.checked),
            best=best,
            distance=distance,
            iteration=s.iteration + 1,
        )
        ends = ops.equal(state.iteration, self.iterations)
        return State(
            *(ops.where(ends, b, a) for a, b in zip(state[:-1], self._next(state), strict=True)),
            s.rates,
        )

    def _next(self, s):
        """The state, without ``rates``, at the beginning of the next search."""
        # c lies between its bounds.
        upper = ops.where(s.reached, s.c, s.upper)
        lower = ops.where(s.reached, s.lower, s.c)
        bounded = upper < _NO_UPPER
        grown = ops.where(s.reached, s.c, 10 * s.c)
        c = ops.where(bounded, (lower + upper) / 2, grown)
        if self.searches >= _REPEAT:
            c = ops.where(ops.equal(s.search, self.searches - 2), upper, c)
        nothing = ops.zeros_like(s.w)
        return s._replace(
            w=nothing,
            mean=nothing,
            square=nothing,
            c=c,
            lower=lower,
            upper=upper,
            reached=ops.zeros_like(s.reached),
            active=ops.ones_like(s.active),
            checked=ops.full_like(s.checked, float("inf")),
            search=s.search + 1,
            iteration=ops.zeros_like(s.iteration),
        )[:-1]

    def result(self, state):
        return state.best
