"""A whole evaluation of one model: attacks, curves, margins, checks, as a report."""

from __future__ import annotations

import datetime
import time
from pathlib import Path

import numpy as np

from keras_emr.attacks.pgd import PGD
from keras_emr.errors import UserError
from keras_emr.evaluation.autoattack import AutoAttack, OutOfTime
from keras_emr.evaluation.checks import Budget, run_checks
from keras_emr.evaluation.inner_loss import InnerLossMeter
from keras_emr.evaluation.inputs import require_finite
from keras_emr.evaluation.margins import effective_margins
from keras_emr.evaluation.outcome import Outcome
from keras_emr.evaluation.robust_accuracy import evaluate_attack
from keras_emr.evaluation.session import perturbation

EPSILONS = (0.25, 0.5, 1.0, 2.0, 4.0)
STEPS = (1, 2, 5, 10, 20, 50, 100)
RESTARTS = 5


class Assessment:
    """Judges one model on N examples and tells everything that a reader needs to believe it.

    Robust accuracy is the worst case of all attacks example by example, over all N.

    Args:
        target: :class:`keras_emr.evaluation.target.KerasTarget`.
        x, y: images (N, H, W, C) in [0, 1] and integer labels.
        epsilon, norm: threat model.
        seed: int.
        batch_size: images at a time.
        extra_examples: curves and checks use the first so many examples; 0: neither is made.
        siblings, natural, budget: for the checks, see :func:`run_checks`.
        progress: called with a title, the work done so far and its total.
        tick: called after every step of the attacks. What either raises ends the evaluation.
    """

    def __init__(
        self,
        target,
        x,
        y,
        epsilon,
        norm="linf",
        *,
        seed=0,
        batch_size=256,
        extra_examples=200,
        siblings=(),
        natural=None,
        budget=None,
        progress=None,
        tick=None,
    ):
        self.tick = tick
        self.siblings, self.natural = siblings, natural
        self.target, self.x, self.y = target, x, y
        self.epsilon, self.norm, self.seed = epsilon, norm, seed
        self.batch_size = min(batch_size, max(len(x), 1))  # shorter batches are padded
        self.few = slice(0, min(extra_examples, len(x)))
        self.extra = extra_examples > 0
        self.budget = budget or Budget()
        self.progress = progress or (lambda title, done, total: None)

    def attack(self, jobs, folder=None, time_budget=None):
        """Run the attacks.

        Args:
            jobs: list of ``(name, attack)``, each run on every example that is right, and of
                :class:`AutoAttack`, whose attacks run on what the ones before left.
            folder: of the state files, or ``None``: an evaluation that is killed begins anew.
            time_budget: seconds for all of them.

        Returns:
            :class:`Outcome`.

        Raises:
            UserError, InfeasibleAttack: see :class:`AutoAttack`.
        """
        deadline = None if time_budget is None else time.monotonic() + time_budget
        scores = self._clean()
        outcome = Outcome(self.x, scores.argmax(axis=1), self.y)
        for number, job in enumerate(jobs):
            suite = job
            if not isinstance(job, AutoAttack):
                suite = AutoAttack(self.epsilon, self.norm, attacks=[job], seed=self.seed)
            state = None
            if folder is not None:
                name = "autoattack" if suite is job else job[0]
                state = Path(folder) / f"{number:02d}-{name}.npz"
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            try:
                result = suite.run_on(
                    self.target,
                    self.x,
                    self.y,
                    outcome.correct,
                    batch_size=self.batch_size,
                    state=state,
                    time_budget=left,
                    progress=self.progress,
                    tick=self.tick,
                )
            except OutOfTime as stopped:
                outcome.add(stopped.result, suite is job)
                outcome.complete = False
                break
            outcome.add(result, suite is job)
        return outcome

    def _clean(self):
        """Logits of the clean images, asked for once: a random model would answer otherwise."""
        self.target.asked = 0
        scores = self.target.predict(self.x)
        require_finite(np.isfinite(scores).all(axis=1))
        return scores

    def report(self, outcome):
        """The report without what only the caller knows: ``model``, ``data``, ``environment``.

        Args:
            outcome: of :meth:`attack`.
        """
        clean = outcome.predicted
        adversarial = self.target.predict(outcome.x_adv).argmax(axis=1)
        margins = self._margins(outcome) if self.target.gradients else None
        extras = self.extra and outcome.complete
        curves = dict.fromkeys(("epsilon", "steps", "restarts"))
        if extras and self.target.gradients:
            for name in curves:
                make = getattr(self, f"_over_{name}")
                curves[name] = self._optional(outcome, f"accuracy over {name}", make)
        checks = None
        if extras:
            checks = self._optional(outcome, "checks", lambda: self._checks(outcome))
        return {
            "schema": "keras-emr-report/1",
            "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "complete": outcome.complete,
            "notes": self._notes(outcome, extras),
            "accuracy": {
                "clean": float(outcome.correct.mean()),
                "robust": float(outcome.robust.mean()),
                "n": len(self.y),
                "correct": int(outcome.correct.sum()),
                "survived": int(outcome.robust.sum()),
            },
            "attacks": outcome.attacks,
            "curves": curves,
            "confusion": {
                "clean": self._confusion(clean),
                "adversarial": self._confusion(adversarial),
            },
            "margins": margins and {at: _summary(m, self.epsilon, self.norm) for at, m in margins},
            "per_class": [self._of_class(k, outcome, margins) for k in range(self.target.classes)],
            "checks": checks or [],
            "gallery": self._gallery(outcome, clean, adversarial),
        }

    def images(self, report, outcome):
        """Arrays for the gallery of ``report``."""
        return [
            {"index": i, "clean": self.x[i], "adversarial": outcome.x_adv[i]}
            for i in (entry["index"] for entry in report["gallery"])
        ]

    def _notes(self, outcome, extras):
        n = len(self.y[self.few])
        if extras and n < len(self.y):
            return [*outcome.notes, f"curves and checks use the first {n} of these images"]
        return outcome.notes

    def _optional(self, outcome, title, make):
        """``make()``, or ``None`` and a note: attacks that took hours are not lost for a curve."""
        try:
            return make()
        except UserError as error:
            outcome.notes.append(f"{title}: {error}")
            return None

    def _margins(self, outcome):
        pairs = []
        for at, images in (("clean", self.x), ("adversarial", outcome.x_adv)):
            self.progress(f"margins ({at})", 0, 1)
            model, size = self.target.model, self.batch_size
            pairs.append((at, effective_margins(model, images, self.y, size)))
            self.progress(f"margins ({at})", 1, 1)
        return pairs

    def _pgd_accuracy(self, attack):
        x, y = self.x[self.few], self.y[self.few]
        return evaluate_attack(
            self.target, attack, x, y, batch_size=self.batch_size, seed=self.seed
        )

    def _over_epsilon(self):
        steps = self.budget.steps
        radii, accuracy = [0.0], []
        for i, ratio in enumerate(EPSILONS):
            self.progress("accuracy over epsilon", i, len(EPSILONS))
            radii.append(ratio * self.epsilon)
            result = self._pgd_accuracy(PGD(radii[-1], self.norm, steps=steps))
            accuracy = accuracy or [result.accuracy]
            accuracy.append(result.robust_accuracy)
        self.progress("accuracy over epsilon", 1, 1)
        return self._curve(f"PGD-{steps}", radii, accuracy)

    def _over_steps(self):
        attack = PGD(self.epsilon, self.norm, steps=STEPS[-1], step_size=self.epsilon / 10)
        size = min(self.batch_size, self.few.stop)
        meter = InnerLossMeter(self.target.model, attack, size)
        title = "accuracy over steps"
        self.progress(title, 0, 1)
        found = meter.curve(
            self.x[self.few],
            self.y[self.few],
            seed=self.seed,
            progress=lambda done, total: self.progress(title, done, total),
        )
        accuracy = [float(found.robust_accuracy[s]) for s in STEPS]
        return self._curve("PGD, step size epsilon / 10, last iterate", list(STEPS), accuracy)

    def _over_restarts(self):
        steps = self.budget.steps
        accuracy = []
        for restarts in range(1, RESTARTS + 1):
            self.progress("accuracy over restarts", restarts - 1, RESTARTS)
            result = self._pgd_accuracy(PGD(self.epsilon, self.norm, steps, restarts=restarts))
            accuracy.append(result.robust_accuracy)
        self.progress("accuracy over restarts", 1, 1)
        return self._curve(f"PGD-{steps}", list(range(1, RESTARTS + 1)), accuracy)

    def _curve(self, attack, x, accuracy):
        n = len(self.y[self.few])
        return {"attack": attack, "n": n, "x": x, "robust_accuracy": accuracy}

    def _checks(self, outcome):
        self.progress("checks", 0, 1)
        checks = run_checks(
            self.target,
            self.x[self.few],
            self.y[self.few],
            self.epsilon,
            self.norm,
            result=outcome.first(self.few.stop),
            siblings=self.siblings,
            natural=self.natural,
            seed=self.seed,
            batch_size=self.batch_size,
            budget=self.budget,
            progress=lambda id, done, total: self.progress("checks", done, total),
        )
        fields = ("id", "title", "verdict", "value", "threshold", "text")
        told = [{name: getattr(check, name) for name in fields} for check in checks]
        for check in told:
            if check["value"] is not None and not np.isfinite(check["value"]):
                check["value"] = None
        return told

    def _confusion(self, predicted):
        counts = np.zeros((self.target.classes,) * 2, int)
        np.add.at(counts, (self.y, predicted), 1)
        return counts.tolist()

    def _of_class(self, k, outcome, margins):
        rows = self.y == k
        clean = dict(margins)["clean"] if margins else None
        return {
            "class": k,
            "n": int(rows.sum()),
            "accuracy": _mean(outcome.correct[rows]),
            "robust_accuracy": _mean(outcome.robust[rows]),
            "effective_margin_l2": _mean(clean.l2[rows]) if margins else None,
            "effective_margin_linf": _mean(clean.linf[rows]) if margins else None,
            "effective_weight_norm": _mean(clean.weight_norm[rows]) if margins else None,
        }

    def _gallery(self, outcome, clean, adversarial):
        shown = slice(0, 8)
        size = perturbation(self.norm, self.x[shown], outcome.x_adv[shown])
        return [
            {
                "index": i,
                "label": int(self.y[i]),
                "predicted_clean": int(clean[i]),
                "predicted_adversarial": int(adversarial[i]),
                "broken_by": outcome.broken_by[i],
                "perturbation": float(size[i]),
            }
            for i in range(len(size))
        ]


def _mean(values):
    values = np.asarray(values, "float64")
    values = values[np.isfinite(values)]
    return float(values.mean()) if len(values) else None


def _summary(margins, epsilon, norm, bins=30):
    """Histograms and means of :class:`Margins`, with infinite margins left out of both.

    The histograms span the 1st to the 99th percentile; what lies beyond is in the outer bins.
    """
    summary = {
        "effective_margin_l2": _mean(margins.l2),
        "effective_margin_linf": _mean(margins.linf),
        "effective_weight_norm": _mean(margins.weight_norm),
        "share_above_epsilon": float((getattr(margins, norm) > epsilon).mean()),
    }
    for name in ("l2", "linf", "weight_norm"):
        values = getattr(margins, name)
        counts, edges = _histogram(values[np.isfinite(values)].astype("float64"), bins)
        summary[name] = {"counts": counts.tolist(), "edges": edges.tolist()}
    return summary


def _histogram(values, bins):
    if not len(values):
        return np.histogram(values, bins)
    low, high = np.percentile(values, (1, 99))  # one far outlier would squeeze all others
    if high - low <= 1e-9 * max(abs(low), abs(high)):
        around = max(0.5, 1e-3 * abs(low))
        low, high = low - around, high + around
    return np.histogram(np.clip(values, low, high), bins, (low, high))
