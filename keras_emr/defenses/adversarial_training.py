"""Adversarial training (Madry et al., ICLR 2018)."""

from keras_emr import losses
from keras_emr.defenses.base import Defense, smoothing
from keras_emr.errors import UserError
from keras_emr.part import non_negative, register


@register
class AdversarialTraining(Defense):
    """AT: ``CE(z(x_adv), y)``, adversarial images only; the attack maximises the same.

    Args:
        clean_weight: share ``a`` of a clean term, in [0, 1):
            ``a CE(z(x), y) + (1 - a) CE(z(x_adv), y)`` (Goodfellow et al., ICLR 2015; GAT).
        label_smoothing: share ``s`` of :func:`keras_emr.losses.cross_entropy`, in [0, 1); the
            attack's objective is not smoothed.
        logit_margin: margin of the same, >= 0, which the attack does not see either: ``s m`` for a
            hypersphere head of scale ``s`` and angular margin ``m`` (Pang et al., NeurIPS 2020).
    """

    name = "at"

    def __init__(self, clean_weight=0.0, label_smoothing=0.0, logit_margin=0.0):
        self.clean_weight = non_negative("clean_weight", clean_weight)
        if self.clean_weight >= 1:
            raise UserError(
                f"clean_weight must be below 1. Received: {clean_weight!r}. Use defense standard."
            )
        self.needs_clean = self.clean_weight > 0
        self.label_smoothing = smoothing(label_smoothing)
        self.logit_margin = non_negative("logit_margin", logit_margin)
        self.takes_shares = not self.logit_margin

    def loss(self, y, clean, adversarial, epoch):
        options = self.label_smoothing, self.logit_margin
        attacked = losses.cross_entropy(y, adversarial, *options)
        if not self.needs_clean:
            return attacked
        share = self.clean_weight
        clean_loss = losses.cross_entropy(y, clean, *options)
        return share * clean_loss + (1 - share) * attacked
