"""LBGAT: learnable boundary guided adversarial training (Cui et al., ICCV 2021)."""

from keras import ops

from keras_emr import losses
from keras_emr.defenses.base import Defense
from keras_emr.defenses.trades import TRADES
from keras_emr.part import non_negative, register


@register
class LBGAT(Defense):
    """``mean_k (z_k(x_adv) - t_k(x))^2 + CE(t(x), y) + beta KL(p(x) || p(x_adv))``.

    ``t`` are the logits of the teacher, a second network that sees clean images only and is
    trained together with the first: by one optimizer, and through the squared difference as well.
    The attack is that of TRADES. As in the authors' code the clean images pass through the network
    in training mode whatever ``beta`` is, so that its BatchNorm statistics are of both kinds.

    Args:
        beta: weight of the divergence, >= 0. The authors use 0 ("LBGAT0") and 6.
    """

    name = "lbgat"
    needs_clean = True
    needs_teacher = True
    takes_shares = True
    attack_defaults = TRADES.attack_defaults

    def __init__(self, beta=0.0):
        self.beta = non_negative("beta", beta)

    def loss(self, y, clean, adversarial, epoch, teacher):
        teacher = losses.widen(teacher)
        square = ops.square(losses.widen(adversarial) - teacher)
        gap = ops.sum(square, axis=-1) / teacher.shape[-1]
        loss = gap + losses.cross_entropy(y, teacher)
        return loss + self.beta * losses.kl_divergence(clean, adversarial) if self.beta else loss
