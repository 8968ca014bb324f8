"""Standard training: no attack."""

from keras_emr import losses
from keras_emr.defenses.base import Defense, smoothing
from keras_emr.part import register


@register
class Standard(Defense):
    """Standard training, the baseline: ``CE(z(x), y)`` on clean images, no attack.

    Args:
        label_smoothing: share ``s`` of :func:`keras_emr.losses.cross_entropy`, in [0, 1).
    """

    name = "standard"
    needs_clean = True
    needs_adversarial = False

    def __init__(self, label_smoothing=0.0):
        self.label_smoothing = smoothing(label_smoothing)

    def loss(self, y, clean, adversarial, epoch):
        return losses.cross_entropy(y, clean, self.label_smoothing)
