"""SPSA: gradients from probes along random signs (Uesato et al., ICML 2018)."""

import numpy as np

from keras_emr.attacks.estimated_gradient import EstimatedGradientAttack, positive
from keras_emr.part import register

_DECAY, _SQUARE_DECAY, _TINY = 0.9, 0.999, 1e-8


@register
class SPSA(EstimatedGradientAttack):
    """Adam along a gradient estimated by simultaneous perturbation (score-based).

    The gradient of the margin, raised, is estimated from pairs of opposite probes
    ``x' +- delta u`` whose directions are random signs, independent for every image
    (:class:`EstimatedGradientAttack`; multiplying by a sign is dividing by it). The perturbation
    takes an Adam step along it (decays 0.9 and 0.999, 1e-8 in the denominator) and is projected
    onto ball and box; Adam's averages are left as they are.

    Args:
        epsilon, norm, restarts: see :class:`QueryAttack`.
        steps: iterations, >= 1. Each costs ``2 samples + 1`` queries per unfinished example:
            25 700 in all with the defaults. 100 to 1000 are usual.
        samples: pairs of probes per step, >= 1; 128 to 8192 are usual.
        delta: distance of a probe in each pixel, in units of [0, 1] images, > 0.
        learning_rate: Adam's, > 0: about the most that a step moves a pixel.
    """

    name = "spsa"

    def __init__(
        self,
        epsilon,
        norm="linf",
        steps=100,
        samples=128,
        delta=0.01,
        learning_rate=0.01,
        restarts=1,
    ):
        super().__init__(epsilon, norm, steps, samples, restarts)
        self.delta = positive("delta", delta)
        self.learning_rate = positive("learning_rate", learning_rate)

    @property
    def probe_distance(self):
        return self.delta

    def directions(self, stream, out):
        out[...] = stream.integers(0, 2, out.shape, "int8")
        out *= 2
        out -= 1

    def begin(self, x):
        return np.zeros(x.shape), np.zeros(x.shape)

    def move(self, image, gradient, memory, active, step):
        mean, square = memory
        mean[active] = _DECAY * mean[active] + (1 - _DECAY) * gradient
        square[active] = _SQUARE_DECAY * square[active] + (1 - _SQUARE_DECAY) * gradient**2
        first = mean[active] / (1 - _DECAY ** (step + 1))
        second = square[active] / (1 - _SQUARE_DECAY ** (step + 1))
        return image + self.learning_rate * first / (np.sqrt(second) + _TINY)
