"""Momentum iterative fast gradient sign method (Dong et al., CVPR 2018)."""

from keras import ops

from keras_emr.attacks.base import Attack
from keras_emr.geometry import norm as norm_of
from keras_emr.geometry import per_example, project
from keras_emr.part import non_negative, register

# A gradient or momentum shorter than this counts as none: dividing by it could overflow.
_NONE = 1e-30


@register
class MIFGSM(Attack):
    """MI-FGSM in the Linf or L2 ball: steps along the accumulated direction of the gradients.

    Per example, from ``m_0 = 0``::

        m <- mu m + g / ||g||_1
        x <- clip01(P(x + step_size * sign(m)))             (L2: m / ||m||_2)

    ``g`` is the gradient of the summed objective; where it is zero only the momentum moves the
    image. The last iterate is returned.

    Args:
        epsilon, norm, steps, restarts, objective: see :class:`Attack`.
        step_size: length of a step; ``None``: ``epsilon / steps``, which never leaves the ball.
        mu: decay of the momentum, >= 0; 0 is the iterative FGSM, 1 the paper's choice.
        start: see :class:`Attack`; the paper starts at the image itself.
    """

    name = "mi-fgsm"
    lengths = ("step_size",)

    def __init__(
        self,
        epsilon,
        norm="linf",
        steps=10,
        step_size=None,
        mu=1.0,
        start="none",
        restarts=1,
        objective=None,
    ):
        super().__init__(epsilon, norm, steps, start, restarts, objective)
        self.step_size = None if step_size is None else non_negative("step_size", step_size)
        self.mu = non_negative("mu", mu)

    @property
    def alpha(self):
        """The step size in force."""
        return self.epsilon / self.steps if self.step_size is None else self.step_size

    def begin(self, objective, x, drawn):
        (image,) = super().begin(objective, x, drawn)
        return image, ops.zeros_like(image)

    def step(self, objective, x, state):
        image, momentum = state
        momentum = self.mu * momentum + _scaled(objective.gradient(image), "l1")
        direction = ops.sign(momentum) if self.norm == "linf" else _scaled(momentum, "l2")
        return project(image + self.alpha * direction, x, self.epsilon, self.norm), momentum


def _scaled(v, kind):
    """``v`` divided, per example, by its norm; zero where that is zero."""
    length = per_example(norm_of(v, kind), v)
    some = length > _NONE
    return ops.where(some, v / ops.where(some, length, ops.ones_like(length)), ops.zeros_like(v))
