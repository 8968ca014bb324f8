"""What several checks need, computed once and only if one of them asks."""

from __future__ import annotations

from functools import cached_property
from typing import NamedTuple

import keras
import numpy as np
from keras import ops

from keras_emr.attacks import ATTACKS
from keras_emr.attacks.fgsm import FGSM
from keras_emr.attacks.pgd import PGD
from keras_emr.errors import UserError
from keras_emr.evaluation.checks.ascent import Ascent
from keras_emr.evaluation.checks.base import NotRun
from keras_emr.evaluation.robust_accuracy import clean_pass, evaluate_attack
from keras_emr.evaluation.target import KerasTarget, as_target
from keras_emr.network import Network

# Largest L2 distance of repeated outputs, scaled to length one, of a model that is not random.
RANDOM = 1e-4


class Flags(NamedTuple):
    """(N,) bool each."""

    correct: np.ndarray
    robust: np.ndarray


class Bench:
    """A model, the examples to spend on it, and the runs on them.

    Runs of PGD attack the examples that are right, and only them (``attacked``: their indices);
    their arrays have as many rows. Arguments as of :func:`run_checks`.
    """

    def __init__(
        self, model, x, y, epsilon, norm, result, siblings, natural, certified, seed, size, budget
    ):
        self.epsilon, self.norm, self.seed, self.budget = epsilon, norm, seed, budget
        self.batch_size = min(size, max(len(x), 1))
        self.target = _target(model, x, self.batch_size)
        self.x, self.y, self.correct = clean_pass(self.target, x, y)
        self.n = len(self.x)
        self.attacked = np.flatnonzero(self.correct)
        self.result, self.certified = result, certified
        shape = self.x.shape[1:]
        classes = self.target.classes
        self.siblings = [as_target(s, shape, classes, self.batch_size) for s in siblings]
        self.natural = natural
        if natural is not None:
            self.natural = as_target(natural, shape, classes, self.batch_size)

    def pgd_of(self, epsilon, steps=None):
        """PGD with that radius; ``None``: the budget's steps."""
        return PGD(epsilon, self.norm, self.budget.steps if steps is None else steps)

    def ascent_on(self, target):
        """PGD on a target. Raises :class:`NotRun` for a function."""
        if not target.gradients:
            raise NotRun("it needs gradients, and the model is a function that can only be asked")
        return Ascent(target.model, self.norm, self.batch_size)

    @cached_property
    def ascent(self):
        return self.ascent_on(self.target)

    def run(self, attack, which=None, restart=0, objective="cross_entropy"):
        """A run on the attacked examples, or on those of them where ``which`` is true."""
        index = self.attacked if which is None else self.attacked[which]
        if not len(self.attacked):
            raise NotRun("no example is classified correctly, so none can be attacked")
        return self.ascent.run(
            attack,
            self.x[index],
            self.y[index],
            index,
            restart=restart,
            seed=self.seed,
            objective=objective,
        )

    @cached_property
    def fgsm(self):
        return self.run(FGSM(self.epsilon, self.norm))

    @cached_property
    def pgd(self):
        return self.run(self.pgd_of(self.epsilon))

    @cached_property
    def dlr(self):
        return self.run(self.pgd_of(self.epsilon), objective="dlr")

    @cached_property
    def strong(self):
        """PGD with the large budget, on what ``pgd`` left: (right at every end, ever wrong)."""
        attack = self.pgd_of(self.epsilon, self.budget.strong_steps)
        right, ever = self.pgd.right.copy(), self.pgd.ever_wrong.copy()
        for restart in range(self.budget.strong_restarts):
            left = np.flatnonzero(right)
            if not len(left):
                break
            trace = self.run(attack, left, restart)
            right[left] = trace.right
            ever[left] |= trace.ever_wrong
        return right, ever

    @cached_property
    def white_box(self):
        """Examples (N,) bool that no iterate of any PGD at epsilon breaks."""
        unbroken = self.correct.copy()
        unbroken[self.attacked] = ~(self.strong[1] | self.dlr.ever_wrong)
        return unbroken

    @cached_property
    def square(self):
        """Examples (N,) bool that Square leaves unbroken."""
        attack = ATTACKS.get("square")(self.epsilon, self.norm, steps=self.budget.square_steps)
        return evaluate_attack(
            self.target, attack, self.x, self.y, batch_size=self.batch_size, seed=self.seed
        ).robust

    def accuracy(self, right):
        """Share of all N examples; ``right``: of the attacked ones."""
        return float(right.sum() / self.n)

    def right(self, images, y=None, target=None):
        """Whether ``target`` (the model) classifies images as ``y``."""
        scores = (target or self.target).predict(images)
        return scores.argmax(axis=1) == (self.y if y is None else y)

    @cached_property
    def answers(self):
        """The raw outputs (passes, M, K) of repeated plain calls on the first batch."""
        batch = self.x[: self.batch_size]
        if not self.target.gradients:
            return np.stack([self.target.predict(batch) for _ in range(self.budget.passes)])
        model, batch = self.target.model, ops.convert_to_tensor(batch)
        # A plain call moves seed generators and whatever else a model keeps; this puts it back.
        kept = [(v, ops.copy(v.value)) for v in model.non_trainable_variables]
        try:
            answers = [
                ops.convert_to_numpy(ops.cast(model(batch, training=False), "float32"))
                for _ in range(self.budget.passes)
            ]
        finally:
            for variable, value in kept:
                variable.assign(value)
        return np.stack(answers)

    @cached_property
    def flags(self):
        """What the evaluation says: ``correct`` and ``robust``, (N,) bool each."""
        if self.result is None:
            raise NotRun("it needs the result of an evaluation (result=)")
        flags = Flags(*(np.asarray(getattr(self.result, n)) for n in Flags._fields))
        if any(flag.shape != (self.n,) for flag in flags):
            raise NotRun(f"the result is not one of these {self.n} examples (M18)")
        return Flags(*(flag.astype(bool) for flag in flags))

    @cached_property
    def found(self):
        """The evaluation's images, (N, H, W, C)."""
        images = np.asarray(self.result.x_adv)
        if images.shape != self.x.shape or not np.isfinite(images).all():
            raise NotRun("the images of the result cannot be used (M12)")
        return images.astype(self.x.dtype)

    @cached_property
    def random(self):
        """(correct counts, largest L2 distance of scaled outputs) of repeated calls."""
        answers = self.answers.astype("float64")
        right = (answers.argmax(axis=2) == self.y[: answers.shape[1]]).sum(axis=1)
        scaled = answers / (np.linalg.norm(answers, axis=2, keepdims=True) + 1e-10)
        apart = np.linalg.norm(scaled[:, None] - scaled[None], axis=3)
        return [int(count) for count in right], float(apart.max())

    @property
    def is_random(self):
        """Whether repeated calls differ, by the threshold of AutoAttack's flag."""
        right, apart = self.random
        return len(set(right)) > 1 or apart > RANDOM


def _target(model, x, batch_size):
    """The target; a Keras model that ends in probabilities is not refused here but reported."""
    if not isinstance(model, keras.Model):
        return as_target(model, np.shape(x)[1:], None, batch_size)
    if len(x):
        first = ops.convert_to_tensor(x[:1], dtype=keras.config.floatx())
        if not model.built:
            model(first, training=False)
        shape = getattr(model, "output_shape", None) or Network(model).frozen()(first).shape
        shape = tuple(shape)
        if len(shape) != 2 or shape[1] < 2:
            raise UserError(
                "the model must give one logit per class. Received: output shape "
                f"{shape}. Expected (N, K) with K >= 2."
            )
    return KerasTarget(model, batch_size)
