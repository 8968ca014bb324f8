"""Projected gradient descent (Madry et al., ICLR 2018)."""

from keras import ops

from keras_emr.attacks.base import Attack
from keras_emr.geometry import ascent, per_example, project
from keras_emr.geometry import norm as norm_of
from keras_emr.part import non_negative, register, whole

# step size * steps / epsilon, unless told otherwise
STEP_RATIO = {"linf": 2.5, "l2": 2.0}


@register
class PGD(Attack):
    """PGD in the Linf or L2 ball.

    Linf: ``x' <- clip01(P(x' + step_size * sign(g)))``. L2: a step of length ``step_size`` along
    ``g / (||g||_2 + 1e-10)``. ``g`` is the gradient of the summed objective; the last iterate is
    returned.

    Args:
        epsilon, norm, steps, start, restarts, objective: see :class:`Attack`.
        step_size: length of a step; ``None``: ``2.5 epsilon / steps`` (Linf, Madry et al.'s rule)
            or ``2 epsilon / steps`` (L2, the TRADES code's).
        box_first: L2 only: clip to [0, 1] before shrinking into the ball (TRADES).
        noise_at_zero: L2 only: where an example's gradient is exactly zero, step along Gaussian
            noise (drawn once per restart) instead of standing still (TRADES), and divide by
            ``||g||_2`` itself elsewhere.
        eot: passes per gradient of a random model, in evaluation: see :class:`Objective`.

    ``None`` for the two before means the defense's own in training, ``False`` in evaluation.
    """

    name = "pgd"
    lengths = ("step_size",)

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
        eot=1,
    ):
        super().__init__(epsilon, norm, steps, start, restarts, objective)
        self.step_size = None if step_size is None else non_negative("step_size", step_size)
        self.box_first = box_first
        self.noise_at_zero = noise_at_zero
        self.eot = whole("eot", eot, 1)

    @property
    def alpha(self):
        """The step size in force."""
        if self.step_size is not None:
            return self.step_size
        return STEP_RATIO[self.norm] * self.epsilon / self.steps

    def draw(self, x, sampler, classes=None):
        drawn = super().draw(x, sampler, classes)
        if self.norm == "l2" and self.noise_at_zero:
            drawn = (*drawn, sampler.normal(ops.shape(x)))
        return drawn

    def begin(self, objective, x, drawn):
        if self.norm == "l2" and self.noise_at_zero:
            return (*super().begin(objective, x, drawn[:-1]), drawn[-1])
        return super().begin(objective, x, drawn)

    def step(self, objective, x, state):
        adversarial = state[0]
        gradient = objective.gradient(adversarial)
        moved = adversarial + self.alpha * self._direction(gradient, state)
        moved = project(moved, x, self.epsilon, self.norm, bool(self.box_first))
        return (moved, *state[1:])

    def _direction(self, gradient, state):
        if self.norm == "linf" or not self.noise_at_zero:
            return ascent(gradient, self.norm)
        length = per_example(norm_of(gradient, "l2"), gradient)
        return ops.where(length > 0, gradient / ops.maximum(length, 1e-30), state[1])


def referee(attack):
    """The attack that validation uses unless told otherwise.

    PGD of the norm, epsilon and steps of ``attack``, and its step size and restarts if it is a PGD
    itself, on cross-entropy from a uniform start.
    """
    config = {"epsilon": attack.epsilon, "norm": attack.norm, "steps": attack.steps}
    if isinstance(attack, PGD):
        config = attack.get_config()
    config |= {"objective": "cross_entropy", "start": "uniform"}
    return PGD(**{k: v for k, v in config.items() if k in PGD.option_names()})
