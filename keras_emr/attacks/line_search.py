"""Steepest ascent with a backtracking line search per example."""

from keras import ops

from keras_emr import backend
from keras_emr.attacks.base import Attack
from keras_emr.errors import UserError
from keras_emr.geometry import ascent, per_example, project
from keras_emr.part import non_negative, one_of, register, whole


@register
class LineSearch(Attack):
    """Projected ascent whose step size a backtracking line search finds, per example and step.

    From ``x_t`` with gradient ``g`` and direction ``p`` (``sign(g)`` for Linf,
    ``g / (||g||_2 + 1e-10)`` for L2), the sizes ``a = initial_step * shrink^j``, ``j = 0, 1, ...``
    are tried and the first ``z = Pi(x_t + a p)`` accepted with::

        l(z) >= l(x_t) + sufficient * <g, z - x_t>          (Armijo)

    where ``Pi`` projects onto ball and box. The last trial is accepted in any case. The last
    iterate is returned.

    This is the inner maximiser of AdvTrain+BLS (Xiong and Hsieh, ECCV 2020). The paper's
    constants could not be read: the defaults are ours.

    Args:
        epsilon, norm, steps, start, restarts, objective: see :class:`Attack`. A step costs one
            input gradient and ``trials - 1`` forward passes: every trial is computed for the
            whole batch, whoever still needs it.
        initial_step: first size tried, >= 0; ``None``: ``2 epsilon``.
        shrink: factor from one trial to the next, in (0, 1).
        sufficient: share of the linear prediction that a step must gain, in [0, 1].
        trials: sizes tried at most, >= 1.
        warm: begin an example's next search at the size just accepted, divided by ``shrink``, but
            at no more than the larger of ``initial_step`` and ``2 epsilon``: sizes beyond that
            all lead to much the same point, and coming back from them would use up the trials.
    """

    name = "line-search"
    lengths = ("initial_step",)

    def __init__(
        self,
        epsilon,
        norm="linf",
        steps=10,
        start=None,
        restarts=1,
        objective=None,
        initial_step=None,
        shrink=0.5,
        sufficient=1e-4,
        trials=6,
        warm=False,
    ):
        super().__init__(epsilon, norm, steps, start, restarts, objective)
        self.initial_step = (
            None if initial_step is None else non_negative("initial_step", initial_step)
        )
        self.shrink = non_negative("shrink", shrink)
        if not 0 < self.shrink < 1:
            raise UserError(f"shrink must be between 0 and 1. Received: {shrink!r}.")
        self.sufficient = non_negative("sufficient", sufficient)
        if self.sufficient > 1:
            raise UserError(f"sufficient must be in [0, 1]. Received: {sufficient!r}.")
        self.trials = whole("trials", trials, 1)
        self.warm = one_of("warm", warm, (False, True))

    @property
    def alpha(self):
        """The first size tried."""
        return 2 * self.epsilon if self.initial_step is None else self.initial_step

    def begin(self, objective, x, drawn):
        state = super().begin(objective, x, drawn)
        if not self.warm:
            return state
        return (*state, ops.full(ops.shape(x)[:1], self.alpha, dtype=x.dtype))

    def step(self, objective, x, state):
        image = state[0]
        value, gradient = objective.value_and_gradient(image)
        direction = ascent(gradient, self.norm)
        axes = tuple(range(1, len(x.shape)))

        def moved(size):
            moved = image + per_example(size, x) * direction
            return project(moved, x, self.epsilon, self.norm)

        def trial(_, search):
            (size,) = search
            found = moved(size)
            # Not `size * direction`: projection shortens the step that is really taken.
            predicted = ops.cast(ops.sum(gradient * (found - image), axis=axes), value.dtype)
            enough = objective.value(found) >= value + self.sufficient * predicted
            # An accepted size is tried, and accepted, again: the batch goes on together.
            return (ops.where(enough, size, self.shrink * size),)

        first = state[1] if self.warm else ops.cast(ops.zeros_like(value), x.dtype) + self.alpha
        # The last trial needs no test.
        (size,) = backend.loop(self.trials - 1, trial, (first,), unroll=objective.unroll)
        if not self.warm:
            return (moved(size),)
        longest = self.alpha
        if self.initial_step is not None:
            longest = ops.maximum(ops.cast(longest, x.dtype), 2 * self.epsilon)
        return moved(size), ops.minimum(size / self.shrink, longest)
