"""What several attacks together did to the same examples."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np


class Outcome:
    """What all attacks together did to N examples.

    ``predicted``: (N,) classes of the clean images. ``correct``, ``robust``: (N,) bool. ``x_adv``:
    (N, H, W, C), the image of the first attack that broke an example, else the clean one.
    ``broken_by``: a name or ``None`` per example. ``attacks``: entries of the report.
    ``complete``: every attack ran to its end. ``suites``: robust accuracy by AutoAttack version,
    of those that ran to their end.
    """

    def __init__(self, x, predicted, y):
        self.predicted = predicted
        self.correct = predicted == y
        self.robust = self.correct.copy()
        self.x_adv = x.copy()
        self.broken_by = [None] * len(x)
        self.attacks, self.notes, self.suites = [], [], {}
        self._flags = []
        self.complete = True

    def add(self, result, is_suite):
        """Merge an :class:`AutoAttackResult`."""
        names = [entry["name"] for entry in result.attacks]
        for i in np.flatnonzero(self.robust & ~result.robust):
            self.x_adv[i] = result.x_adv[i]
            number = result.broken_by[i]
            self.broken_by[i] = names[number] if number < len(names) else "unfinished attack"
        self.robust &= result.robust
        self.notes += [note for note in result.notes if note not in self.notes]
        own = ("name", "attacked", "broken", "robust_accuracy", "queries", "seconds")
        for number, entry in enumerate(result.attacks):
            before = (result.broken_by >= 0) & (result.broken_by <= number)
            self._flags.append(
                {
                    "name": entry["name"],
                    "eot": entry.get("eot"),
                    "robust": (result.correct & ~before),
                }
            )
            options = {k: v for k, v in entry.items() if k not in own}
            mode = "survivors" if is_suite else "individual"
            self.attacks.append({**{k: entry[k] for k in own}, "options": options, "mode": mode})
        if is_suite and result.complete:
            self.suites[result.version] = result.robust_accuracy

    def first(self, n):
        """What the checks look at, of the first ``n`` examples."""
        entries = []
        for entry in self._flags:
            robust = entry["robust"][:n]
            entries.append({**entry, "robust": robust, "robust_accuracy": float(robust.mean())})
        return SimpleNamespace(
            correct=self.correct[:n],
            robust=self.robust[:n],
            x_adv=self.x_adv[:n],
            attacks=entries,
        )
