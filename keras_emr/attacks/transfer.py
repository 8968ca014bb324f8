"""Transfer from a surrogate: images made against another model."""

from __future__ import annotations

import numpy as np

from keras_emr.attacks.query import QueryAttack, wrong
from keras_emr.errors import UserError
from keras_emr.part import register


@register
class Transfer(QueryAttack):
    """The images that ``attack`` finds against ``surrogates``, tried on the target.

    Against each surrogate the labels are the true ones, and an example is attacked whether or not
    the surrogate is right about it. The target is asked once per surrogate and example. An
    evaluation shows masked gradients where this breaks more than the white-box attacks do.

    Args:
        attack: a white-box attack that stays in its ball, e.g. ``PGD`` or ``MIFGSM``.
        surrogates: Keras classifiers to logits, of the same images and classes, e.g. one trained
            normally and one trained adversarially, with other seeds.
        batch_size: images at a time.
        seed: of the noise of ``attack``.

    Source: Papernot et al., 2016; Madry et al., ICLR 2018 (black-box rows).
    """

    name = "transfer"
    needs = "labels"

    def __init__(self, attack, surrogates, batch_size=256, seed=0):
        if isinstance(attack, QueryAttack) or not getattr(attack, "bounded", True):
            raise UserError(
                f"transfer needs a white-box attack within a ball. Received: {attack!r}. Expected "
                "for example PGD."
            )
        super().__init__(attack.epsilon, attack.norm, attack.steps, 1)
        self.attack = attack
        self.surrogates = list(surrogates)
        if not self.surrogates:
            raise UserError("transfer needs a surrogate. Received: none. Expected Keras models.")
        self.batch_size = batch_size
        self.seed = seed
        self._runs = None

    @property
    def variables(self):
        """Weights of the surrogates."""
        return [v for model in self.surrogates for v in model.variables]

    def describe(self):
        return {
            "name": self.name,
            "attack": self.attack.describe(),
            "surrogates": [model.name for model in self.surrogates],
            "epsilon": self.epsilon,
            "norm": self.norm,
            "seed": self.seed,
        }

    def search(self, query, x, y, streams, progress=None):
        # Here and not above: evaluation imports the attacks.
        from keras_emr.evaluation.attack_run import AttackRun

        found, unbroken = x.copy(), np.ones(len(x), bool)
        queries = np.zeros(len(x), int)
        # The surrogate's noise comes from the example's own stream.
        noise = np.array([stream.integers(2**31) for stream in streams])
        if self._runs is None:  # compiled once
            self._runs = [AttackRun(m, self.attack, self.batch_size) for m in self.surrogates]
        tick = progress and (lambda share: progress(0))
        for run in self._runs:
            todo = np.flatnonzero(unbroken)
            for begin in range(0, len(todo), run.batch_size):
                rows = todo[begin : begin + run.batch_size]
                images, _ = run.attack_batch(x[rows], y[rows], noise[rows], 0, self.seed, tick)
                fooled = wrong(y[rows], query(images))
                queries[rows] += 1
                found[rows[fooled]] = images[fooled]
                unbroken[rows[fooled]] = False
        return found, queries
