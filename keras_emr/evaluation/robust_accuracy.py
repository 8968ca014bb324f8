"""Accuracy under an attack: which examples survive it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from keras import ops

from keras_emr import backend, losses
from keras_emr.attacks.base import Objective
from keras_emr.evaluation.batching import in_batches, padded
from keras_emr.evaluation.inputs import checked_examples, require_finite
from keras_emr.models.logits import require_logits
from keras_emr.network import Network
from keras_emr.sampling import ExampleSampler


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
    run = _Run(model, attack, batch_size=min(batch_size, len(x)))
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
            _require_feasible(attack, x[index], found)
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


class _Run:
    """One model and attack, compiled once: a single step, repeated from the host.

    Compile time then does not grow with the number of steps; the images stay on the device.
    """

    def __init__(self, model, attack, batch_size):
        self.attack = attack
        self.batch_size = batch_size
        self.network = Network(model)
        self._predict = backend.compiled(self._judge, model.variables)
        variables = [*model.variables, *attack.variables]
        self._begin = backend.compiled(self._first, variables)
        self._step = backend.compiled(self._advance, variables)
        self._loss = backend.compiled(self._final_loss, model.variables)

    def _objective(self, x, y):
        return Objective(self.network.frozen(), self.attack.objective or "cross_entropy", x, y)

    def _judge(self, x, y):
        logits = self.network.frozen()(x)
        return losses.correct(y, logits), ops.all(ops.isfinite(logits), axis=-1)

    def _first(self, x, y, drawn):
        return self.attack.begin(self._objective(x, y), x, drawn)

    def _advance(self, x, y, state):
        return self.attack.step(self._objective(x, y), x, state)

    def _final_loss(self, x, y, x_adv):
        objective = self._objective(x, y)
        return objective.loss(objective.logits(x_adv))

    def judge(self, x, y):
        """Which examples are right, and whose logits are finite: two (N,) bool."""
        return in_batches(self._predict, self.batch_size, x, y)

    def attack_batch(self, x, y, index, restart, seed):
        rows, size = len(x), self.batch_size
        sampler = ExampleSampler(seed, restart, padded(index, size))
        x, y = (ops.convert_to_tensor(padded(a, size)) for a in (x, y))
        drawn = self.attack.draw(x, sampler, self.network.classes)
        state = self._begin(x, y, drawn)
        for _ in range(self.attack.steps):
            state = self._step(x, y, state)
        found = self.attack.result(state)
        loss = self._loss(x, y, found)
        return ops.convert_to_numpy(found)[:rows], ops.convert_to_numpy(loss)[:rows]


def _perturbation(attack, x, x_adv):
    delta = (x_adv.astype("float64") - x).reshape(len(x), -1)
    return np.abs(delta).max(axis=1) if attack.norm == "linf" else np.linalg.norm(delta, axis=1)


def _largest(attack, x, x_adv):
    return float(_perturbation(attack, x, x_adv).max())


def _require_feasible(attack, x, x_adv):
    if not np.isfinite(x_adv).all():
        raise InfeasibleAttack(f"{attack!r} returned NaN or infinite pixels")
    largest = _largest(attack, x, x_adv)
    if largest > attack.epsilon + 1e-6 or x_adv.min() < 0 or x_adv.max() > 1:
        raise InfeasibleAttack(
            f"{attack!r} left its threat model: {attack.norm} norm {largest:.8f}, pixels in "
            f"[{x_adv.min()}, {x_adv.max()}]"
        )
