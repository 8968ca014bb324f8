"""NES: gradients from Gaussian probes (Ilyas, Engstrom, Athalye and Lin, ICML 2018)."""

import numpy as np

from keras_emr.attacks.ball import lengths
from keras_emr.attacks.estimated_gradient import EstimatedGradientAttack, positive
from keras_emr.part import non_negative, register


@register
class NES(EstimatedGradientAttack):
    """PGD along a gradient estimated by natural evolution strategies (score-based).

    The gradient of the margin, raised, is estimated from pairs of opposite Gaussian probes
    (:class:`EstimatedGradientAttack`); then, with ``P`` the projection onto ball and box::

        x' <- P(x' + step_size * sign(g))                       (Linf)
        x' <- P(x' + step_size * g / (||g||_2 + 1e-10))         (L2)

    Args:
        epsilon, norm, restarts: see :class:`QueryAttack`.
        steps: iterations, >= 1. Each costs ``2 samples + 1`` queries per unfinished example:
            10 100 in all with the defaults.
        samples: pairs of probes per step, >= 1; 50 to 100 are usual.
        sigma: standard deviation of the probes, in units of [0, 1] images, > 0; 0.001 to 0.01
            are usual. A smaller one is nearer to the derivative, but in float32 the difference of
            two scores is then mostly rounding.
        step_size: length of a step; ``None``: ``2.5 epsilon / steps``.
    """

    name = "nes"

    def __init__(
        self,
        epsilon,
        norm="linf",
        steps=100,
        samples=50,
        sigma=0.01,
        step_size=None,
        restarts=1,
    ):
        super().__init__(epsilon, norm, steps, samples, restarts)
        self.sigma = positive("sigma", sigma)
        self.step_size = None if step_size is None else non_negative("step_size", step_size)

    @property
    def alpha(self):
        """The step size in force."""
        return 2.5 * self.epsilon / self.steps if self.step_size is None else self.step_size

    @property
    def probe_distance(self):
        return self.sigma

    def directions(self, stream, out):
        stream.standard_normal(out=out, dtype="float32")

    def move(self, image, gradient, memory, active, step):
        linf = self.norm == "linf"
        direction = np.sign(gradient) if linf else gradient / (lengths(gradient) + 1e-10)
        return image + self.alpha * direction
