"""Standard training: no attack."""

from keras_emr import losses
from keras_emr.defenses.base import Defense
from keras_emr.part import register


@register
class Standard(Defense):
    """Standard training, the baseline: ``CE(z(x), y)`` on clean images, no attack."""

    name = "standard"
    needs_clean = True
    needs_adversarial = False

    def loss(self, y, clean, adversarial, epoch):
        return losses.cross_entropy(y, clean)
