"""How a regularizer's weight changes over the epochs of a run."""

from keras import ops

from keras_emr.part import Part, register, whole


@register
class StepDecay(Part):
    """Factor ``factor ** n`` from the start of the n-th of the given epochs on.

    Args:
        epochs: 1-based epoch numbers, as Keras prints them. The authors' EMR release decays at
            the start of epochs 60 and 90, an epoch before its learning rate drops.
        factor: default 0.1.
    """

    def __init__(self, epochs, factor=0.1):
        self.epochs = sorted(whole("decay epochs", epoch, 1) for epoch in epochs)
        self.factor = float(factor)

    def __call__(self, epoch):
        number = ops.cast(epoch, "int32") + 1
        multiplier = 1.0
        for boundary in self.epochs:
            multiplier = multiplier * ops.where(number >= boundary, self.factor, 1.0)
        return multiplier


@register
class WarmUp(Part):
    """Linear growth: ``epoch_number / epochs`` up to 1.

    Args:
        epochs: length of the warm-up, >= 1.
    """

    def __init__(self, epochs):
        self.epochs = whole("warm-up epochs", epochs, 1)

    def __call__(self, epoch):
        number = ops.cast(ops.cast(epoch, "int32") + 1, "float32")
        return ops.minimum(number / self.epochs, 1.0)
