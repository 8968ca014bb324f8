"""Accuracy under an attack: which examples survive it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from keras_emr.evaluation.attack_run import AttackRun
from keras_emr.evaluation.inputs import checked_examples, require_finite
from keras_emr.models.logits import require_logits
from keras_emr.network import Network


class InfeasibleAttack(AssertionError):
    """An attack returned an image outside its threat model: a bug, never a result."""


@dataclass(frozen=True)
class AttackResult:
    """Outcome of an attack on N examples.

    ``correct``: (N,) bool, right on the clean image. ``robust``: (N,) bool, right on the clean
    image and on every adversarial image found. ``x_adv``: (N, H, W, C); for a broken example the
    image that broke it, for an unbroken one the image with the highest loss, for an example that
    was wrong to begin with the clean image. ``max_perturbation``: largest norm of a perturbation.
    """

    correct: np.ndarray
    robust: np.ndarray
    x_adv: np.ndarray
    max_perturbation: float

    @property
    def accuracy(self) -> float:
        return float(self.correct.mean())

    @property
    def robust_accuracy(self) -> float:
        """Survivors over all N examples; one that is wrong clean counts as not robust."""
        return float(self.robust.mean())


def evaluate_attack(model, attack, x, y, *, batch_size=256, seed=0, progress=None):
    """Run ``attack`` on every example that ``model`` classifies correctly.

    The model is attacked in inference mode and float32. The numbers an example is attacked with
    depend on (seed, restart, its index) alone, so neither the batch size nor the backend changes
    them. Examples broken by one restart are left out of the next. The last iterate of each
    restart is tested.

    Args:
        model: Keras classifier to logits.
        attack: e.g. ``PGD(8/255, steps=50, restarts=5)``.
        x: (N, H, W, C) images in [0, 1].
        y: (N,) integer labels.
        batch_size: images at a time; the last batch is padded.
        seed: int.
        progress: called with the number of attack steps done so far and their total.

    Returns:
        :class:`AttackResult`.

    Raises:
        UserError: the model ends in softmax or gives NaN, there are no examples, images outside
            [0, 1] or labels outside [0, K).
        InfeasibleAttack: the attack left its ball or [0, 1], or returned NaN.
    """
    require_logits(model, np.shape(x)[1:])
    x, y = checked_examples(x, y, Network(model).classes)
    run = AttackRun(model, attack, batch_size=min(batch_size, len(x)))
    correct, finite = run.judge(x, y)
    require_finite(finite)
    robust = correct.copy()
    x_adv = x.copy()
    highest = np.full(len(x), -np.inf)
    total = attack.restarts * attack.steps * -(-int(correct.sum()) // run.batch_size)
    done = 0
    for restart in range(attack.restarts):
        survivors = np.flatnonzero(robust)
        for begin in range(0, len(survivors), run.batch_size):
            index = survivors[begin : begin + run.batch_size]
            found, loss = run.attack_batch(x[index], y[index], index, restart, seed)
            require_feasible(attack, x[index], found)
            still_right, _ = run.judge(found, y[index])
            keep = ~still_right | (loss > highest[index])
            x_adv[index[keep]] = found[keep]
            highest[index] = np.maximum(highest[index], loss)
            robust[index] = still_right
            done += attack.steps
            if progress:
                progress(done, total)
    if progress:
        progress(total, total)
    return AttackResult(correct, robust, x_adv, _largest(attack, x, x_adv))


def _perturbation(attack, x, x_adv):
    delta = (x_adv.astype("float64") - x).reshape(len(x), -1)
    return np.abs(delta).max(axis=1) if attack.norm == "linf" else np.linalg.norm(delta, axis=1)


def _largest(attack, x, x_adv):
    return float(_perturbation(attack, x, x_adv).max())


def require_feasible(attack, x, x_adv):
    """Raise :class:`InfeasibleAttack` unless the images ``x_adv`` are within the threat model."""
    if not np.isfinite(x_adv).all():
        raise InfeasibleAttack(f"{attack!r} returned NaN or infinite pixels")
    largest = _largest(attack, x, x_adv)
    if largest > attack.epsilon + 1e-6 or x_adv.min() < 0 or x_adv.max() > 1:
        raise InfeasibleAttack(
            f"{attack!r} left its threat model: {attack.norm} norm {largest:.8f}, pixels in "
            f"[{x_adv.min()}, {x_adv.max()}]"
        )
