"""MART (Wang et al., ICLR 2020)."""

from keras_emr import losses
from keras_emr.defenses.base import Defense
from keras_emr.part import non_negative, register


@register
class MART(Defense):
    """``BCE(x_adv) + beta KL(p(x) || p(x_adv)) (1 - p_y(x))``, as in the authors' code.

    Boosted cross-entropy and the constants inside the logarithms: see
    :func:`keras_emr.losses.boosted_cross_entropy` and :func:`keras_emr.losses.weighted_kl`. The
    attack maximises plain cross-entropy from ``x + 0.001 n``.

    Args:
        beta: weight of the divergence, >= 0. The authors use 5 (ResNet-18) and 6 (WRN-34-10).
        logit_margin: margin of the boosted cross-entropy, >= 0: ``s m`` for a hypersphere head (our
            combination; Pang et al., NeurIPS 2020, have none with MART).
    """

    name = "mart"
    needs_clean = True
    attack_defaults = {"objective": "cross_entropy", "start": "gaussian"}

    def __init__(self, beta=5.0, logit_margin=0.0):
        self.beta = non_negative("beta", beta)
        self.logit_margin = non_negative("logit_margin", logit_margin)

    def loss(self, y, clean, adversarial, epoch):
        boosted = losses.boosted_cross_entropy(y, adversarial, self.logit_margin)
        return boosted + self.beta * losses.weighted_kl(y, clean, adversarial)
