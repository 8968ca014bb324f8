"""A whole evaluation of one model: attacks, curves, margins, checks, as a report."""

from __future__ import annotations

import datetime
import time
from pathlib import Path

import numpy as np

from keras_emr.attacks.pgd import PGD
from keras_emr.evaluation.autoattack import AutoAttack, OutOfTime
from keras_emr.evaluation.checks import Budget, run_checks
from keras_emr.evaluation.inner_loss import InnerLossMeter
from keras_emr.evaluation.margins import effective_margins
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
        budget=None,
        progress=None,
        tick=None,
    ):
        self.tick = tick
        self.target, self.x, self.y = target, x, y
        self.epsilon, self.norm, self.seed, self.batch_size = epsilon, norm, seed, batch_size
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
        outcome = Outcome(self.x)
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
                result = suite.run(
                    self.target,
                    self.x,
                    self.y,
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

    def report(self, outcome):
        """The report without what only the caller knows: ``model``, ``data``, ``environment``.

        Args:
            outcome: of :meth:`attack`.
        """
        clean = self.target.predict(self.x).argmax(axis=1)
        adversarial = self.target.predict(outcome.x_adv).argmax(axis=1)
        margins = self._margins(outcome) if self.target.gradients else None
        extras = self.extra and outcome.complete
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
            "curves": self._curves(extras and self.target.gradients),
            "confusion": {
                "clean": self._confusion(clean),
                "adversarial": self._confusion(adversarial),
            },
            "margins": margins and {at: _summary(m, self.epsilon, self.norm) for at, m in margins},
            "per_class": [self._of_class(k, outcome, margins) for k in range(self.target.classes)],
            "checks": self._checks(outcome) if extras else [],
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

    def _margins(self, outcome):
        pairs = []
        for at, images in (("clean", self.x), ("adversarial", outcome.x_adv)):
            self.progress(f"margins ({at})", 0, 1)
            model, size = self.target.model, self.batch_size
            pairs.append((at, effective_margins(model, images, self.y, size)))
            self.progress(f"margins ({at})", 1, 1)
        return pairs

    def _curves(self, wanted):
        if not wanted:
            return dict.fromkeys(("epsilon", "steps", "restarts"))
        return {
            "epsilon": self._over_epsilon(),
            "steps": self._over_steps(),
            "restarts": self._over_restarts(),
        }

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
        meter = InnerLossMeter(self.target.model, attack, self.batch_size)
        title = "accuracy over steps"
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
        checks = run_checks(
            self.target,
            self.x[self.few],
            self.y[self.few],
            self.epsilon,
            self.norm,
            result=outcome.first(self.few.stop),
            seed=self.seed,
            batch_size=self.batch_size,
            budget=self.budget,
            progress=lambda id, done, total: self.progress("checks", done, total),
        )
        fields = ("id", "title", "verdict", "value", "threshold", "text")
        return [{name: getattr(check, name) for name in fields} for check in checks]

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
        size = perturbation(self.norm, self.x, outcome.x_adv)
        return [
            {
                "index": i,
                "label": int(self.y[i]),
                "predicted_clean": int(clean[i]),
                "predicted_adversarial": int(adversarial[i]),
                "broken_by": outcome.broken_by[i],
                "perturbation": float(size[i]),
            }
            for i in range(min(8, len(self.y)))
        ]


class Outcome:
    """What all attacks together did to N examples.

    ``correct``, ``robust``: (N,) bool. ``x_adv``: (N, H, W, C), the image of the first attack that
    broke an example, else the clean one. ``broken_by``: a name or ``None`` per example.
    ``attacks``: entries of the report. ``complete``: every attack ran to its end. ``suites``:
    robust accuracy by AutoAttack version, of those that ran to their end.
    """

    def __init__(self, x):
        self.correct = self.robust = None
        self.x_adv = x.copy()
        self.broken_by = [None] * len(x)
        self.attacks, self.notes, self.suites = [], [], {}
        self.complete = True

    def add(self, result, is_suite):
        """Merge an :class:`AutoAttackResult`."""
        if self.robust is None:
            self.correct, self.robust = result.correct.copy(), result.correct.copy()
        names = [entry["name"] for entry in result.attacks]
        for i in np.flatnonzero(self.robust & ~result.robust):
            self.x_adv[i] = result.x_adv[i]
            number = result.broken_by[i]
            self.broken_by[i] = names[number] if number < len(names) else "unfinished attack"
        self.robust &= result.robust
        self.notes += [note for note in result.notes if note not in self.notes]
        own = ("name", "attacked", "broken", "robust_accuracy", "queries", "seconds")
        for entry in result.attacks:
            options = {k: v for k, v in entry.items() if k not in own}
            mode = "survivors" if is_suite else "individual"
            self.attacks.append({**{k: entry[k] for k in own}, "options": options, "mode": mode})
        if is_suite and result.complete:
            self.suites[result.version] = result.robust_accuracy

    def first(self, n):
        """The first ``n`` examples' ``correct``, ``robust`` and ``x_adv``."""
        part = Outcome(self.x_adv[:n])
        part.correct, part.robust = self.correct[:n], self.robust[:n]
        return part


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
        values = values[np.isfinite(values)].astype("float64")
        if len(values):  # one far outlier would squeeze all others into a bin
            values = np.clip(values, *np.percentile(values, (1, 99)))
        counts, edges = np.histogram(values, bins=bins)
        summary[name] = {"counts": counts.tolist(), "edges": edges.tolist()}
    return summary
