"""Accuracy under an attack: which examples survive it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from keras_emr.evaluation.inputs import checked_examples, require_finite
from keras_emr.evaluation.session import InfeasibleAttack as InfeasibleAttack
from keras_emr.evaluation.session import open_session, perturbation, portions
from keras_emr.evaluation.session import require_feasible as require_feasible
from keras_emr.evaluation.target import as_target


@dataclass(frozen=True)
class AttackResult:
    """Outcome of an attack on N examples.

    ``correct``: (N,) bool, right on the clean image. ``robust``: (N,) bool, right on the clean
    image and on every adversarial image found. ``x_adv``: (N, H, W, C); for a broken example the
    image that broke it, for an unbroken one the image with the highest loss, for an example that
    was wrong to begin with the clean image. ``max_perturbation``: largest norm of a perturbation.
    ``queries``: images that the attack asked the model about, 0 for one that uses gradients.
    """

    correct: np.ndarray
    robust: np.ndarray
    x_adv: np.ndarray
    max_perturbation: float
    queries: int = 0

    @property
    def accuracy(self) -> float:
        return float(self.correct.mean())

    @property
    def robust_accuracy(self) -> float:
        """Survivors over all N examples; one that is wrong clean counts as not robust."""
        return float(self.robust.mean())


def evaluate_attack(model, attack, x, y, *, batch_size=256, seed=0, progress=None, classes=None):
    """Run ``attack`` on every example that ``model`` classifies correctly.

    The model is attacked in inference mode and float32. The numbers an example is attacked with
    depend on (seed, run, its index) alone, so neither the batch size nor the backend changes
    them. Examples broken by one run are left out of the next. The last iterate of each run is
    tested, or what the attack itself keeps (APGD, minimum-norm attacks).

    Args:
        model: Keras classifier to logits; or, for attacks that only ask, a function from images
            to scores or labels (:func:`keras_emr.evaluation.target.as_target`).
        attack: e.g. ``PGD(8/255, steps=50, restarts=5)``.
        x: (N, H, W, C) images in [0, 1].
        y: (N,) integer labels.
        batch_size: images at a time; the last batch is padded.
        seed: int.
        progress: called with the number of examples done so far and their total.
        classes: number of classes, for a function that gives labels.

    Returns:
        :class:`AttackResult`.

    Raises:
        UserError: the model ends in softmax or gives NaN, there are no examples, images outside
            [0, 1], labels outside [0, K), an attack that needs more than the model gives.
        InfeasibleAttack: the attack left its ball or [0, 1], or returned NaN.
    """
    batch_size = min(batch_size, max(len(x), 1))
    target = as_target(model, np.shape(x)[1:], classes, batch_size)
    x, y, correct = clean_pass(target, x, y)
    session = open_session(target, attack, batch_size)
    robust = correct.copy()
    x_adv = x.copy()
    highest = np.full(len(x), -np.inf)
    runs = attack.runs(target.classes)
    queries = done = 0
    total = runs * int(correct.sum())
    for run in range(runs):
        for index in portions(session, np.flatnonzero(robust)):
            found = session.find(x[index], y[index], index, run, seed)
            keep = found.broken | (found.loss > highest[index])
            x_adv[index[keep]] = found.images[keep]
            highest[index] = np.maximum(highest[index], found.loss)
            robust[index] = ~found.broken
            queries += found.queries
            done += len(index)
            if progress:
                progress(done, total)
    if progress:
        progress(max(total, 1), max(total, 1))
    largest = float(perturbation(attack.norm, x, x_adv).max())
    return AttackResult(correct, robust, x_adv, largest, queries)


def clean_pass(target, x, y):
    """Checked images and labels, and which of them are right: ``(x, y, correct)``.

    Raises:
        UserError: see :func:`checked_examples`; logits of clean images that are not finite.
    """
    target.asked = 0  # a random model's noise is numbered by what it was asked
    if target.classes is None:  # a function tells with its first answer
        target.predict(np.asarray(x[:1], "float32"))
    x, y = checked_examples(x, y, target.classes)
    scores = target.predict(x)
    require_finite(np.isfinite(scores).all(axis=1))
    return x, y, scores.argmax(axis=1) == y
