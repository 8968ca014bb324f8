"""How a regularizer's weight changes over the epochs of a run."""

from keras import ops

from keras_emr.attacks.base import register
from keras_emr.errors import UserError


@register
class StepDecay:
    """Factor ``factor ** n`` from the start of the n-th of the given epochs on.

    Args:
        epochs: 1-based epoch numbers, as Keras prints them. The authors' EMR release decays at
            the start of epochs 60 and 90, an epoch before its learning rate drops.
        factor: default 0.1.
    """

    def __init__(self, epochs, factor=0.1):
        if not all(isinstance(e, int) and e >= 1 for e in epochs):
            raise UserError(f"decay epochs must be whole numbers >= 1. Received: {epochs!r}.")
        self.epochs = sorted(epochs)
        self.factor = float(factor)

    def __call__(self, epoch):
        number = ops.cast(epoch, "int32") + 1
        multiplier = 1.0
        for boundary in self.epochs:
            multiplier = multiplier * ops.where(number >= boundary, self.factor, 1.0)
        return multiplier

    def get_config(self):
        return {"epochs": self.epochs, "factor": self.factor}

    @classmethod
    def from_config(cls, config):
        return cls(**config)


@register
class WarmUp:
    """Linear growth: ``epoch_number / epochs`` up to 1.

    Args:
        epochs: length of the warm-up, >= 1.
    """

    def __init__(self, epochs):
        if not isinstance(epochs, int) or epochs < 1:
            raise UserError(f"warm-up epochs must be a whole number >= 1. Received: {epochs!r}.")
        self.epochs = epochs

    def __call__(self, epoch):
        number = ops.cast(ops.cast(epoch, "int32") + 1, "float32")
        return ops.minimum(number / self.epochs, 1.0)

    def get_config(self):
        return {"epochs": self.epochs}

    @classmethod
    def from_config(cls, config):
        return cls(**config)
