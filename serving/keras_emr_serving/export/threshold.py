"""From which effective margin on a prediction is trusted."""

from __future__ import annotations

import math

import numpy as np


def choose_threshold(margins, right, keep=0.95, fallback=0.0):
    """The threshold above which ``keep`` of the right predictions lie.

    The largest one that lets at least that share of the correctly classified validation images
    through: half-way between two of their margins, so that rounding does not move an image across.
    What share of wrong and of attacked images it stops is measured, not assumed: see
    :func:`trust_summary`.

    Args:
        margins: (N,) effective margins of the predicted class on validation images, >= 0.
        right: (N,) bool, whether the prediction is right.
        keep: share of right predictions to be trusted, in (0, 1].
        fallback: threshold where no prediction is right.

    Returns:
        ``(threshold, rule)``: a float that float32 holds exactly, and how it came about.
    """
    mine = np.sort(np.asarray(margins, "float64")[np.asarray(right, bool)])
    if not len(mine):
        return float(np.float32(fallback)), "epsilon: no validation image is classified right"
    rejected = len(mine) - math.ceil(keep * len(mine) - 1e-9)
    first_kept = mine[rejected]
    below = mine[mine < first_kept]
    lower = below[-1] if len(below) else 0.0
    middle = lower if np.isinf(first_kept) else (lower + first_kept) / 2
    return float(
        np.float32(middle)
    ), f"{100 * keep:g} % of right validation predictions are above it"


def trust_summary(trusted, right, attacked):
    """Which shares of images are trusted, by kind; ``None`` where there is none of a kind.

    Args:
        trusted: (N,) bool, as the model serves it.
        right: (N,) bool, whether the prediction is right.
        attacked: (N,) bool, whether the image is adversarial.

    Returns:
        Plain dictionary: ``right_clean``, ``wrong_clean``, ``right_attacked``, ``wrong_attacked``,
        each with ``n`` and ``trusted``.
    """
    summary = {}
    for kind, of_kind in (("clean", ~attacked), ("attacked", attacked)):
        for verdict, judged in (("right", right), ("wrong", ~right)):
            chosen = trusted[of_kind & judged]
            share = float(chosen.mean()) if len(chosen) else None
            summary[f"{verdict}_{kind}"] = {"n": len(chosen), "trusted": share}
    return summary
