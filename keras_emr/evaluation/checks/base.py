"""What a check is: a question with a number, a threshold and a sentence for its reader."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from keras_emr.part import whole

VERDICTS = ("pass", "warn", "fail", "not run")


@dataclass(frozen=True)
class Check:
    """Outcome of one check.

    ``id`` and ``title``; ``verdict``: one of ``VERDICTS``; ``value``: the number behind it, and
    ``threshold``: the most (M17: more than, M19: at least) that it may be. Accuracies and shares
    are fractions: 0.01 is one percentage point. ``text``: what was seen, what it means, what to
    do. ``details``: further plain values.
    """

    id: str
    title: str
    verdict: str
    value: float | int | None
    threshold: float | None
    text: str
    details: dict = field(default_factory=dict)


@dataclass(frozen=True)
class Budget:
    """How much the checks may do; less finds less.

    ``steps``: of PGD. ``strong_steps`` and ``strong_restarts``: of the PGD that it is compared
    with (M5, nearly all of the time). ``square_steps``: queries per example of Square (M2).
    ``random_points``: per example (M7). ``gradient_points``: examples of the finite differences
    (M8). ``passes``: repeated calls (M10).
    """

    steps: int = 20
    strong_steps: int = 200
    strong_restarts: int = 5
    square_steps: int = 500
    random_points: int = 100
    gradient_points: int = 64
    passes: int = 5

    def __post_init__(self):
        for name in self.__dataclass_fields__:
            whole(name, getattr(self, name), 2 if name == "passes" else 1)


class NotRun(Exception):
    """A check cannot be made; the message is the reason."""


class Finding(NamedTuple):
    """What the function of a check returns."""

    verdict: str
    value: float | int | None
    text: str
    details: dict = {}


class Rule(NamedTuple):
    """A check that can be made: ``find(bench) -> Finding``."""

    id: str
    title: str
    threshold: float | None
    find: Callable

    def __call__(self, bench):
        try:
            found = self.find(bench)
        except NotRun as reason:
            found = Finding("not run", None, f"Not run: {reason}.")
        return Check(
            self.id,
            self.title,
            found.verdict,
            found.value,
            self.threshold,
            found.text,
            found.details,
        )


RULES: dict[str, Rule] = {}


def rule(id, title, threshold=None):
    """Make a function of a :class:`Bench` the check ``id``."""

    def add(find):
        RULES[id] = Rule(id, title, threshold, find)
        return find

    return add


def graded(excess, threshold, n):
    """Verdict on a share of ``n`` examples: what is a single example warns, more fails."""
    if excess <= threshold + 1e-9:
        return "pass"
    return "warn" if excess * n < 1.5 else "fail"


def percent(share):
    """A share as people read it."""
    return f"{100 * share:.1f} %"
