"""Projected gradient descent (Madry et al., ICLR 2018)."""

from keras import ops

from keras_emr.attacks.base import Attack
from keras_emr.geometry import norm as norm_of
from keras_emr.geometry import per_example, project
from keras_emr.part import non_negative, one_of, register

STARTS = ("uniform", "gaussian", "none")
_STEP_RATIO = {"linf": 2.5, "l2": 2.0}


@register
class PGD(Attack):
    """PGD in the Linf or L2 ball.

    Linf: ``x' <- clip01(P(x' + step_size * sign(g)))``. L2: a step of length ``step_size`` along
    ``g / (||g||_2 + 1e-10)``. ``g`` is the gradient of the summed objective; the last iterate is
    returned.

    Args:
        epsilon, norm, steps, restarts, objective: see :class:`Attack`.
        step_size: length of a step; ``None``: ``2.5 epsilon / steps`` (Linf, Madry et al.'s rule)
            or ``2 epsilon / steps`` (L2, the TRADES code's).
        start: ``uniform`` (Linf: uniform in the ball, clipped to [0, 1]; L2: Gaussian direction,
            radius uniform in [0, epsilon]), ``gaussian`` (``x + 0.001 n``, not clipped, as TRADES,
            MART and MAIL start) or ``none``. ``None``: the defense's own in training, ``uniform``
            in evaluation.
        box_first: L2 only: clip to [0, 1] before shrinking into the ball (TRADES).
        noise_at_zero: L2 only: where an example's gradient is exactly zero, step along Gaussian
            noise (drawn once per restart) instead of standing still (TRADES), and divide by
            ``||g||_2`` itself elsewhere.

    ``None`` for the last two means the defense's own in training, ``False`` in evaluation.
    """

    name = "pgd"

    def __init__(
        self,
        epsilon,
        norm="linf",
        steps=10,
        step_size=None,
        start=None,
        restarts=1,
        objective=None,
        box_first=None,
        noise_at_zero=None,
    ):
        super().__init__(epsilon, norm, steps, restarts, objective)
        self.step_size = None if step_size is None else non_negative("step_size", step_size)
        self.start = one_of("start", start, (None, *STARTS))
        self.box_first = box_first
        self.noise_at_zero = noise_at_zero

    @property
    def alpha(self):
        """The step size in force."""
        if self.step_size is not None:
            return self.step_size
        return _STEP_RATIO[self.norm] * self.epsilon / self.steps

    def begin(self, x, sampler):
        shape = ops.shape(x)
        rule = self.start or "uniform"
        if rule == "gaussian":
            first = x + 0.001 * sampler.normal(shape)
        elif rule == "uniform" and self.norm == "linf":
            first = ops.clip(x + self.epsilon * sampler.uniform(shape), 0.0, 1.0)
        elif rule == "uniform":
            direction = sampler.normal(shape)
            radius = self.epsilon * sampler.uniform((shape[0],), 0.0, 1.0)
            delta = direction * per_example(radius / norm_of(direction, "l2"), x)
            first = ops.clip(x + delta, 0.0, 1.0)
        else:
            first = x
        if self.norm == "l2" and self.noise_at_zero:
            return first, sampler.normal(shape)
        return (first,)

    def step(self, objective, x, state):
        adversarial = state[0]
        gradient = objective.gradient(adversarial)
        if self.norm == "linf":
            direction = ops.sign(gradient)
        else:
            direction = self._unit(gradient, state)
        moved = adversarial + self.alpha * direction
        moved = project(moved, x, self.epsilon, self.norm, bool(self.box_first))
        return (moved, *state[1:])

    def _unit(self, gradient, state):
        """L2 direction of a step: the normalised gradient, or noise where there is none."""
        length = per_example(norm_of(gradient, "l2"), gradient)
        if not self.noise_at_zero:
            return gradient / (length + 1e-10)
        return ops.where(length > 0, gradient / ops.maximum(length, 1e-30), state[1])
