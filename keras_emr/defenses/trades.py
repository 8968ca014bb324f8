"""TRADES (Zhang et al., ICML 2019)."""

from keras_emr import losses
from keras_emr.defenses.base import Defense, smoothing
from keras_emr.part import non_negative, register


@register
class TRADES(Defense):
    """``CE(z(x), y) + beta KL(p(x) || p(x_adv))``.

    The clean distribution is the reference of the divergence and gradients flow through both
    sides; the clean logits of one training-mode pass serve both terms (the authors' code makes
    two). The attack maximises the same divergence from ``x + 0.001 n``: at ``x`` itself its
    gradient is zero.

    Args:
        beta: weight of the divergence, >= 0. The authors use 6 on CIFAR-10 and 1 on MNIST.
        label_smoothing: share ``s`` of :func:`keras_emr.losses.cross_entropy`, in [0, 1); of the
            first term alone.
        logit_margin: margin of the same, >= 0, of the first term alone: ``s m`` for a hypersphere
            head of scale ``s`` and angular margin ``m`` (Pang et al., NeurIPS 2020).
    """

    name = "trades"
    needs_clean = True
    attack_defaults = {
        "objective": "kl",
        "start": "gaussian",
        "box_first": True,
        "noise_at_zero": True,
    }

    def __init__(self, beta=6.0, label_smoothing=0.0, logit_margin=0.0):
        self.beta = non_negative("beta", beta)
        self.label_smoothing = smoothing(label_smoothing)
        self.logit_margin = non_negative("logit_margin", logit_margin)
        self.takes_shares = not self.logit_margin

    def loss(self, y, clean, adversarial, epoch):
        divergence = losses.kl_divergence(clean, adversarial)
        entropy = losses.cross_entropy(y, clean, self.label_smoothing, self.logit_margin)
        return entropy + self.beta * divergence
