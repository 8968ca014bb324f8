"""Adversarial training (Madry et al., ICLR 2018)."""

from keras_emr import losses
from keras_emr.defenses.base import Defense
from keras_emr.part import register


@register
class AdversarialTraining(Defense):
    """AT: ``CE(z(x_adv), y)``, adversarial images only; the attack maximises the same."""

    name = "at"

    def loss(self, y, clean, adversarial, epoch):
        return losses.cross_entropy(y, adversarial)
