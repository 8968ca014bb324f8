"""Fast gradient sign method (Goodfellow et al., ICLR 2015)."""

from keras_emr.attacks.pgd import PGD
from keras_emr.part import register


@register
class FGSM(PGD):
    """One step of length ``epsilon`` from the clean image: ``clip01(x + epsilon sign(g))``.

    Args:
        epsilon, norm, objective: see :class:`Attack`.
    """

    name = "fgsm"

    def __init__(self, epsilon, norm="linf", objective=None):
        super().__init__(
            epsilon, norm, steps=1, step_size=float(epsilon), start="none", objective=objective
        )
