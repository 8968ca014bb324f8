"""Averages of the weights along training: EMA and SWA, kept by every step, used by validation."""

from __future__ import annotations

import contextlib

from keras import ops

from keras_emr.errors import UserError
from keras_emr.part import Part, non_negative, one_of, register, whole

STATISTICS = ("copy", "average")


class Averaging(Part):
    """How the average ``a`` follows the weights: ``a <- d a + (1 - d) w`` after every step."""

    statistics = "copy"
    start = 1

    def share(self, count, number):
        """``(d, taken)`` of a step from ``start`` on.

        Args:
            count: steps taken into the average so far.
            number: steps of the whole run, this one included. Both are integer tensors.

        Returns:
            ``d`` as float32, and 1 or 0 for whether the step counts.
        """
        raise NotImplementedError


@register
class EMA(Averaging):
    """Exponential moving average: ``d = min(decay, (1 + t) / (10 + t))``, t steps since ``start``.

    Args:
        decay: 0.995 and 0.999 are common.
        start: 1-based epoch; before it the average is a copy of the weights.
        statistics: BatchNorm's moving statistics: ``copy``: those of the weights in training, as
            published adversarial training does; ``average``: averaged in the same way.
    """

    def __init__(self, decay=0.995, start=1, statistics="copy"):
        self.decay = non_negative("EMA decay", decay)
        if self.decay >= 1:
            raise UserError(f"EMA decay must be below 1. Received: {decay!r}.")
        self.start = whole("start of averaging", start, 1)
        self.statistics = one_of("statistics", statistics, STATISTICS)

    def share(self, count, number):
        t = ops.cast(count, "float32")
        return ops.minimum(self.decay, (1.0 + t) / (10.0 + t)), ops.ones_like(count)


@register
class SWA(Averaging):
    """Stochastic weight averaging: the plain mean over every ``every``-th step from ``start`` on.

    (Izmailov et al., UAI 2018; with adversarial training: Chen et al., ICLR 2021.)

    Args:
        start: 1-based epoch; before its first sample the average is a copy of the weights.
        every: steps between samples; the steps of an epoch: one sample at each epoch's end.
        statistics: BatchNorm's moving statistics: ``average``, over the same samples (the original
            estimates them anew on the training data instead), or ``copy``.
    """

    def __init__(self, start, every=1, statistics="average"):
        self.start = whole("start of averaging", start, 1)
        self.every = whole("steps between samples", every, 1)
        self.statistics = one_of("statistics", statistics, STATISTICS)

    def share(self, count, number):
        taken = ops.cast(ops.equal(number % self.every, 0), "int32")
        n = ops.cast(count, "float32")
        waiting = ops.cast(count > 0, "float32")
        return ops.where(taken > 0, n / (n + 1.0), waiting), taken


def constrained(variable, value):
    """``value``, projected if ``variable`` has a constraint, as an optimizer's step ends too."""
    return value if variable.constraint is None else variable.constraint(value)


class AveragedWeights:
    """What a classifier does with an average: keep it, and validate and save with it."""

    def _build_averages(self):
        if self.averaging is None:
            return
        followed = [*self.model.trainable_variables]
        if self.averaging.statistics == "average":
            others = self.model.non_trainable_variables
            followed += [v for v in others if "float" in str(v.dtype)]  # not the seeds
        self._followed = followed
        self._averages = [
            self.add_weight(
                shape=v.shape, dtype=v.dtype, initializer="zeros", trainable=False, name="average"
            )
            for v in followed
        ]
        counter = {"shape": (), "dtype": "int32", "initializer": "zeros", "trainable": False}
        self._average_count = self.add_weight(name="average_count", **counter)
        self._average_number = self.add_weight(name="average_number", **counter)

    def average_step(self):
        """Take the weights that a step has just made into the average."""
        if self.averaging is None:
            return
        number = self._average_number.value + 1
        epoch = ops.maximum(self.epoch.value, 0) + 1  # `train_on_batch` never sets it
        begun = ops.cast(epoch >= self.averaging.start, "int32")
        share, taken = self.averaging.share(self._average_count.value, number)
        share = share * ops.cast(begun, "float32")
        for variable, average in zip(self._followed, self._averages, strict=True):
            d = ops.cast(share, average.dtype)
            mean = d * average.value + (1.0 - d) * variable.value
            average.assign(constrained(variable, mean))
        self._average_count.assign(self._average_count.value + taken * begun)
        self._average_number.assign(number)

    @contextlib.contextmanager
    def averaged(self):
        """Within the block the classifier's network has the averaged weights, if there are any.

        ``evaluate`` and the validation of ``fit`` use it by themselves; use it around
        ``classifier.model.save(...)``.
        """
        active = (
            self.averaging is not None
            and self.built
            and not self._swapped
            and int(ops.convert_to_numpy(self._average_number)) > 0
        )
        if active:
            self._swap()
        try:
            yield
        finally:
            if active:
                self._settle()
                self._swap()

    def _swap(self):
        for variable, average in zip(self._followed, self._averages, strict=True):
            value = ops.copy(variable.value)
            variable.assign(average.value)
            average.assign(value)
        self._swapped = not self._swapped

    def evaluate(self, *args, **kwargs):
        """As ``keras.Model.evaluate``, with the averaged weights if there are any."""
        with self.averaged():
            return super().evaluate(*args, **kwargs)
