"""Learning rates as the published recipes change them: functions of the optimizer's step."""

from __future__ import annotations

import math

import keras
from keras import ops

from keras_emr.errors import UserError
from keras_emr.part import non_negative, register, whole


class EpochSchedule(keras.optimizers.schedules.LearningRateSchedule):
    """``rate`` times a factor that depends on the epoch, of ``steps_per_epoch`` optimizer steps.

    The step is the optimizer's own counter, which checkpoints hold: a resumed run goes on exactly.

    Args:
        rate: the learning rate where the factor is 1, > 0.
        steps_per_epoch: >= 1.
        warmup: epochs over which the rate grows linearly to what the schedule says.
    """

    def __init__(self, rate, steps_per_epoch, warmup=0):
        super().__init__()
        self.rate = non_negative("learning rate", rate)
        self.steps_per_epoch = whole("steps_per_epoch", steps_per_epoch, 1)
        self.warmup = whole("learning rate warm-up", warmup, 0)

    def factor(self, step):
        """The factor at optimizer step ``step``, an integer tensor counted from 0."""
        return ops.ones((), "float32")

    def __call__(self, step):
        step = ops.cast(step, "int32")
        rate = self.rate * self.factor(step)
        if self.warmup:
            grown = ops.cast(step + 1, "float32") / (self.warmup * self.steps_per_epoch)
            rate = rate * ops.minimum(grown, 1.0)
        return rate

    def progress(self, step, epochs):
        """Share of ``epochs`` that has passed at ``step``, at most 1; float32 scalar."""
        return ops.minimum(ops.cast(step, "float32") / (epochs * self.steps_per_epoch), 1.0)

    def get_config(self):
        return {
            "rate": self.rate,
            "steps_per_epoch": self.steps_per_epoch,
            "warmup": self.warmup,
        }


@register
class Constant(EpochSchedule):
    """The same rate throughout, after a warm-up."""


@register
class Steps(EpochSchedule):
    """Times ``factor`` from the *start* of each of the given 1-based epochs on.

    TRADES, MART and MAIL drop that way at 75, 90 and 100. The EMR release drops at the *end* of
    epochs 60 and 90: 61, 91 here.

    Args:
        epochs: 1-based epochs, at least one.
        decay: factor of each drop.
    """

    def __init__(self, rate, steps_per_epoch, epochs, decay=0.1, warmup=0):
        super().__init__(rate, steps_per_epoch, warmup)
        self.epochs = sorted(whole("learning rate epochs", epoch, 1) for epoch in epochs)
        if not self.epochs:
            raise UserError(
                "a learning rate that drops needs its epochs. Received: none. Expected for example "
                "75, 90."
            )
        self.decay = non_negative("learning rate factor", decay)

    def factor(self, step):
        factor = ops.ones((), "float32")
        for epoch in self.epochs:
            after = step >= (epoch - 1) * self.steps_per_epoch
            factor = factor * ops.where(after, self.decay, 1.0)
        return factor

    def get_config(self):
        return {**super().get_config(), "epochs": self.epochs, "decay": self.decay}


@register
class Cosine(EpochSchedule):
    """``(1 + cos(pi t)) / 2``, ``t`` the share of ``epochs`` that has passed; 0 in the end."""

    def __init__(self, rate, steps_per_epoch, epochs, warmup=0):
        super().__init__(rate, steps_per_epoch, warmup)
        self.epochs = whole("epochs", epochs, 1)

    def factor(self, step):
        return (1.0 + ops.cos(math.pi * self.progress(step, self.epochs))) / 2.0

    def get_config(self):
        return {**super().get_config(), "epochs": self.epochs}


@register
class Cyclic(EpochSchedule):
    """From 0 up to ``rate`` and down to 0 again, linearly (fast AT: Wong et al., ICLR 2020).

    Args:
        peak: share of the epochs at which ``rate`` is reached, in (0, 1).
    """

    def __init__(self, rate, steps_per_epoch, epochs, peak=0.5, warmup=0):
        super().__init__(rate, steps_per_epoch, warmup)
        self.epochs = whole("epochs", epochs, 1)
        self.peak = non_negative("peak", peak)
        if not 0 < self.peak < 1:
            raise UserError(f"peak must lie between 0 and 1. Received: {peak!r}.")

    def factor(self, step):
        t = self.progress(step, self.epochs)
        return ops.minimum(t / self.peak, (1.0 - t) / (1.0 - self.peak))

    def get_config(self):
        return {**super().get_config(), "epochs": self.epochs, "peak": self.peak}


SCHEDULES = ("constant", "steps", "cosine", "cyclic")


def learning_rate(name, rate, steps_per_epoch, epochs, drops=None, decay=0.1, warmup=0):
    """The schedule called ``name``; a plain number where it would be constant.

    Args:
        name: one of ``SCHEDULES``.
        rate: largest learning rate.
        steps_per_epoch, epochs: of the whole run.
        drops: 1-based epochs, for ``steps`` alone.
        decay: factor of each drop.
        warmup: epochs of linear growth at the start.

    Raises:
        UserError: an unknown name, or options that do not go together.
    """
    if name not in SCHEDULES:
        raise UserError(
            f"unknown learning rate schedule. Received: {name!r}. Expected one of: "
            f"{', '.join(SCHEDULES)}."
        )
    if (name == "steps") != bool(drops):
        raise UserError(
            "the epochs at which the learning rate drops belong to the schedule steps. Received: "
            f"schedule {name}, epochs {drops or 'none'}."
        )
    if name == "constant":
        return Constant(rate, steps_per_epoch, warmup) if warmup else rate
    if name == "steps":
        return Steps(rate, steps_per_epoch, drops, decay, warmup=warmup)
    made = {"cosine": Cosine, "cyclic": Cyclic}[name]
    return made(rate, steps_per_epoch, epochs, warmup=warmup)
