"""What is searched: parameters, each with a range or a list of values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

SAMPLINGS = ("linear", "log")


@dataclass(frozen=True)
class Choice:
    """One of ``values``, each in the text form that a flag would have.

    ``when``: ``{other parameter: values}``: it is searched only where the other one has one of
    these values.
    """

    name: str
    values: tuple[str, ...]
    when: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class Range:
    """A number from ``low`` to ``high``, both included; ``whole``: an integer.

    ``sampling``: ``log`` draws its logarithm evenly (``low`` > 0). ``step``: distance of two
    values; under ``log`` their ratio, > 1.
    """

    name: str
    low: float
    high: float
    whole: bool = False
    sampling: str = "linear"
    step: float | None = None
    when: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
