"""Targeted Auto-PGD (Croce and Hein, ICML 2020): the strongest part of AutoAttack."""

from keras import ops

from keras_emr.attacks.apgd import APGD, State
from keras_emr.part import register, whole


@register
class APGDTargeted(APGD):
    """APGD on the targeted DLR loss, one run per target class.

    Run ``r`` (0-based) aims at the class with the ``r + 2``-th largest logit of the clean image.
    Any misclassification is a success, not only that of the target.

    Args:
        epsilon, norm, steps, start, restarts, rho, keep, eot: see :class:`APGD`.
        targets: most target classes; a model with K classes has K - 1. Each costs a run.
    """

    name = "apgd-t"
    evaluation_only = True

    def __init__(
        self,
        epsilon,
        norm="linf",
        steps=100,
        start=None,
        restarts=1,
        rho=0.75,
        keep=None,
        eot=1,
        targets=9,
    ):
        super().__init__(epsilon, norm, steps, start, restarts, "dlr", rho, keep, eot)
        self.targets = whole("targets", targets, 1)

    def runs(self, classes):
        return min(self.targets, classes - 1) * self.restarts

    def draw(self, x, sampler, classes=None):
        rank = sampler.restart % min(self.targets, classes - 1) + 1
        # A tensor, so that no target needs a compilation of its own.
        return (*super().draw(x, sampler, classes), ops.convert_to_tensor(rank, dtype="int32"))

    def begin(self, objective, x, drawn):
        *drawn, rank = drawn
        order = ops.argsort(-objective.logits(x), axis=-1)
        target = ops.cast(ops.take(order, rank, axis=1), "int32")
        return target, super().begin(objective.towards(target), x, drawn)

    def step(self, objective, x, state):
        target, state = state
        return target, super().step(objective.towards(target), x, State(*state))

    def result(self, state):
        return super().result(State(*state[1]))
