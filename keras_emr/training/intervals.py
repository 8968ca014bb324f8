"""How often a checkpoint is written inside an epoch: a time or a number of steps."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from keras_emr.errors import UserError

_UNITS = {"": 1, "s": 1, "m": 60, "h": 3600}
_DURATION = re.compile(r"(\d+(?:\.\d*)?|\.\d+)\s*([smh]?)")
_STEPS = re.compile(r"(\d+)\s*steps?")


@dataclass(frozen=True)
class Every:
    """An interval; whichever of the two is over first ends it.

    Attributes:
        seconds: of wall-clock time.
        steps: training steps.
    """

    seconds: float = math.inf
    steps: float = math.inf

    @classmethod
    def parse(cls, value: Every | str | float) -> Every:
        """From ``600``, ``90s``, ``10m``, ``2h`` or ``500steps``; a bare number is seconds.

        Raises:
            UserError: something else, or not above zero.
        """
        if isinstance(value, Every):
            return value
        text = str(value).strip().lower()
        made = None
        if match := _STEPS.fullmatch(text):
            made = cls(steps=int(match[1]))
        elif match := _DURATION.fullmatch(text):
            made = cls(seconds=float(match[1]) * _UNITS[match[2]])
        if made is None or isinstance(value, bool) or not min(made.seconds, made.steps) > 0:
            raise UserError(
                f"bad interval between checkpoints. Received: {value!r}. Expected a time such as "
                "90s, 10m or 2h, or a number of steps such as 500steps."
            )
        return made

    def over(self, seconds: float, steps: int) -> bool:
        """Whether it has passed, after so much time and so many steps."""
        return seconds >= self.seconds or steps >= self.steps


def check_interval(text: str) -> str:
    """``text``. Raises :class:`UserError` unless :meth:`Every.parse` takes it."""
    Every.parse(text)
    return text
