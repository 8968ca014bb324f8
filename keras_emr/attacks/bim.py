"""Basic iterative method, I-FGSM (Kurakin et al., 2017)."""

import math

from keras_emr.attacks.pgd import PGD
from keras_emr.part import register


@register
class BIM(PGD):
    """PGD from the clean image.

    Args:
        epsilon, norm, objective: see :class:`Attack`.
        step_size: length of a step, default 1/255.
        steps: iterations; ``None``: Kurakin's ``min(255 epsilon + 4, 1.25 * 255 epsilon)``,
            rounded up, at least 1.
    """

    name = "bim"

    def __init__(self, epsilon, norm="linf", steps=None, step_size=1 / 255, objective=None):
        if steps is None:
            # The subtraction keeps 8/255, rounded to float32 or not, from counting as above 8.
            levels = 255 * float(epsilon)
            steps = max(1, math.ceil(min(levels + 4, 1.25 * levels) - 1e-4))
        super().__init__(
            epsilon, norm, steps=steps, step_size=step_size, start="none", objective=objective
        )
