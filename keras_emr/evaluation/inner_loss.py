"""How far an inner maximizer gets: mean loss after each of its steps, and how long that takes."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
from keras import ops

from keras_emr import backend, losses
from keras_emr.attacks.apgd import APGD
from keras_emr.attacks.learned import LearnedAttack
from keras_emr.attacks.line_search import LineSearch
from keras_emr.attacks.pgd import PGD
from keras_emr.errors import UserError
from keras_emr.evaluation.attack_run import AttackRun
from keras_emr.evaluation.inputs import checked_examples, require_finite
from keras_emr.evaluation.robust_accuracy import require_feasible
from keras_emr.network import Network


@dataclass(frozen=True)
class InnerLoss:
    """What an attack of T steps reached on N examples.

    ``loss``: (T + 1,) mean cross-entropy in nats after 0..T steps. ``robust_accuracy``: (T + 1,)
    share of the examples that are right both clean and at the image of that step (only that one,
    one start: a coarse upper bound).
    """

    loss: np.ndarray
    robust_accuracy: np.ndarray


class Judge:
    """Cross-entropy and correctness of a model, compiled once for many attacks."""

    def __init__(self, model):
        self.network = Network(model)
        self._compiled = backend.compiled(self._batch, model.variables)

    def _batch(self, x, y):
        logits = self.network.frozen()(x)
        finite = ops.all(ops.isfinite(logits), axis=-1)
        return losses.cross_entropy(y, logits), losses.correct(y, logits), finite

    def __call__(self, x, y):
        """(N,) cross-entropy, (N,) right, (N,) finite logits, as NumPy arrays."""
        return tuple(ops.convert_to_numpy(out) for out in self._compiled(x, y))


class InnerLossMeter:
    """Measures one model and attack again and again, compiled once.

    What is measured is always the cross-entropy, also where the attack maximises something else,
    and always at what the attack would return if it ended there: for APGD the image with the
    highest objective so far, for the others the newest iterate. Random numbers are a function of
    (seed, the example's index), so that attacks with the same start share them.

    Args:
        model: Keras classifier to logits.
        attack: an attack; one start, ``restarts`` is not looked at.
        batch_size: images at a time.
        judge: a :class:`Judge` of the same model, to share; ``None``: a new one.
    """

    def __init__(self, model, attack, batch_size=128, judge=None):
        self.attack = attack.with_defaults(
            keep="best_loss", objective="cross_entropy", start="uniform"
        )
        self.run = AttackRun(model, self.attack, batch_size)
        self.judge = judge or Judge(model)

    def curve(self, x, y, *, steps=None, seed=0, progress=None):
        """Mean cross-entropy after each step: :class:`InnerLoss`.

        Args:
            x: (N, H, W, C) images in [0, 1].
            y: (N,) integer labels.
            steps: how many steps to go; ``None``: the attack's own number.
            seed: int.
            progress: called with the number of batches done so far and their total.

        Raises:
            UserError: images, labels or logits that mean nothing.
            InfeasibleAttack: the attack left its ball or [0, 1].
        """
        x, y = checked_examples(x, y, self.run.network.classes)
        steps = self.attack.steps if steps is None else steps
        loss, robust = np.zeros(steps + 1), np.zeros(steps + 1)
        size = self.run.batch_size
        for begin in range(0, len(x), size):
            index = np.arange(begin, min(begin + size, len(x)))
            rows = len(index)
            batch, labels, drawn = self.run.prepare(x[index], y[index], index, 0, seed)
            _, clean, finite = (part[:rows] for part in self.judge(batch, labels))
            require_finite(finite)
            for t, state in enumerate(self.run.states(batch, labels, drawn, steps)):
                found = self.attack.result(state)
                value, right, _ = (part[:rows] for part in self.judge(found, labels))
                loss[t] += value.astype("float64").sum()
                robust[t] += (right & clean).sum()
            require_feasible(self.attack, x[index], ops.convert_to_numpy(found)[:rows])
            if progress:
                progress(begin + rows, len(x))
        if not np.isfinite(loss).all():
            raise UserError(
                f"the loss under attack {self.attack.name!r} is not finite. Received: a mean of "
                f"{loss[~np.isfinite(loss)][0]}. The model's logits overflow: take another "
                "checkpoint."
            )
        return InnerLoss(loss / len(x), robust / len(x))

    def stopwatch(self, x, y, *, steps=None, seed=0):
        """A function without arguments: attacks one batch, returns (T + 1,) seconds.

        Entry t is the time from the clean batch until the image after t steps is ready; entry 0
        is the start's own (for APGD one gradient). Random numbers are drawn beforehand, on the
        host, and are not counted. The first call compiles, unless :meth:`curve` has run.
        """
        rows = min(len(x), self.run.batch_size)
        batch = self.run.prepare(x[:rows], y[:rows], np.arange(rows), 0, seed)

        def attack_once():
            marks = []
            began = time.perf_counter()
            for state in self.run.states(*batch, steps):
                ops.convert_to_numpy(state[0][:1])  # until it is really there
                marks.append(time.perf_counter() - began)
            return np.array(marks)

        return attack_once


def passes(attack, steps=None):
    """What ``steps`` steps cost: ``{"input_gradients": ..., "forward_passes": ...}`` per example.

    An input gradient is a pass forwards and one backwards; ``forward_passes`` come on top. What
    an attack adds itself (a recurrent cell, a generator) is not in it. ``None`` for an attack
    whose cost is not known here.

    Args:
        attack: the attack.
        steps: ``None``: its own number.
    """
    steps = attack.steps if steps is None else steps
    gradients, forward = steps, 0
    if isinstance(attack, APGD):
        gradients += 1  # at the start
    elif isinstance(attack, LineSearch):
        forward = steps * (attack.trials - 1)
    elif isinstance(attack, LearnedAttack):
        gradients = steps if attack.maximizer.reads_gradient else 0
    elif not isinstance(attack, PGD):
        return None
    if attack.start == "odi":
        gradients += 2
    return {"input_gradients": gradients, "forward_passes": forward}
