"""The training steps that are timed, and the passes through the network that each cannot avoid."""

from __future__ import annotations

from dataclasses import dataclass

import keras

from keras_emr.attacks.learned import LearnedAttack
from keras_emr.attacks.pgd import PGD
from keras_emr.regularizers.effective_margin import EffectiveMarginRegularizer
from keras_emr.training.classifier import RobustClassifier


@dataclass(frozen=True)
class Job:
    """A name of ``keras_emr.benchmark.JOBS``, e.g. ``trades-emr``: defense, then what it has."""

    name: str

    @property
    def defense(self):
        return self.name.split("-")[0]

    @property
    def extras(self):
        """``emr``, ``lstm``."""
        return self.name.split("-")[1:]

    def classifier(
        self, model, epsilon, steps, attack_precision="float32", learn_share=1.0, seed=0
    ):
        """A compiled :class:`RobustClassifier` that trains ``model`` so (SGD with momentum)."""
        attack = None
        if self.defense != "standard":
            attack = PGD(epsilon, steps=steps)
            if "lstm" in self.extras:
                options = {"steps": steps, "learn_share": learn_share}
                attack = LearnedAttack(epsilon, maximizer="lstm", **options)
        penalties = [EffectiveMarginRegularizer(0.01)] if "emr" in self.extras else []
        robust = RobustClassifier(
            model,
            self.defense,
            attack=attack,
            regularizers=penalties,
            attack_precision=attack_precision,
            seed=seed,
        )
        robust.compile(keras.optimizers.SGD(0.01, momentum=0.9))
        return robust

    def least(self, steps, shares_passes=False):
        """:class:`Least` of a step with so many attack steps.

        ``shares_passes``: of the network, see :class:`keras_emr.network.Network`.
        """
        if self.defense == "standard":
            inner, full, forward = 0, 1, 0
        else:
            # The loss of TRADES and MART has a clean pass as well; the divergence that TRADES's
            # attack climbs starts from the logits of a pass in inference mode.
            inner = steps
            full = 1 if self.defense == "at" else 2
            forward = int(self.defense == "trades")
        if "lstm" in self.extras:
            inner += 1  # what it learns from needs the gradient at its last step
        penalty = int("emr" in self.extras)
        return Least(inner, full, forward, penalty, penalty * shares_passes)


@dataclass(frozen=True)
class Least:
    """Passes that a step cannot do without, by the method's definition.

    ``inner``: forwards and back to the image (an attack's step); ``full``: forwards, back, and the
    weights' gradients; ``forward``: forwards alone; ``penalty``: input gradients differentiated by
    the weights (EMR): forwards and back to the image once, then as much again for the derivative,
    since a rectified network is linear around every image; ``shared``: forward passes among these
    that the loss makes already.

    What else a step does is not in it: cells of a maximizer, noise, projections, metrics.
    """

    inner: int
    full: int
    forward: int
    penalty: int
    shared: int = 0

    def flops(self, cost):
        """Per example, by a :class:`keras_emr.training.cost.Forward`."""
        there_and_back = cost.flops + cost.to_input
        return (
            self.inner * there_and_back
            + self.full * cost.step
            + (self.forward - self.shared) * cost.flops
            + self.penalty * (there_and_back + cost.flops + cost.to_weights)
        )

    def seconds(self, forward, inner, full):
        """By measured times of the passes; EMR's derivative costs what a full step goes back."""
        derivative = (full - forward) * self.penalty
        inner_passes = self.inner + self.penalty
        alone = (self.forward - self.shared) * forward
        return inner_passes * inner + self.full * full + alone + derivative
