"""Standard training: no attack."""

from keras_emr import losses
from keras_emr.defenses.base import Defense, smoothing
from keras_emr.part import non_negative, register


@register
class Standard(Defense):
    """Standard training, the baseline: ``CE(z(x), y)`` on clean images, no attack.

    Args:
        label_smoothing: share ``s`` of :func:`keras_emr.losses.cross_entropy`, in [0, 1).
        logit_margin: margin of the same, >= 0: ``s m`` for a hypersphere head.
    """

    name = "standard"
    needs_clean = True
    needs_adversarial = False

    def __init__(self, label_smoothing=0.0, logit_margin=0.0):
        self.label_smoothing = smoothing(label_smoothing)
        self.logit_margin = non_negative("logit_margin", logit_margin)
        self.takes_shares = not self.logit_margin

    def loss(self, y, clean, adversarial, epoch):
        return losses.cross_entropy(y, clean, self.label_smoothing, self.logit_margin)
