"""Checks of attacks at other radii than the one of the evaluation."""

from __future__ import annotations

import math

import numpy as np

from keras_emr.evaluation.checks.base import Finding, graded, percent, rule

_GRID = (0.25, 0.5, 1, 2, 4)


@rule("M3", "an unbounded attack breaks everything", 0.0)
def unbounded(bench):
    whole = 1.0 if bench.norm == "linf" else math.sqrt(bench.x[0].size)
    attack = bench.pgd_of(whole)
    left = ~bench.run(attack).ever_wrong
    if left.any():
        left[left] = ~bench.run(attack, left, objective="dlr").ever_wrong
    accuracy = bench.accuracy(left)
    verdict = graded(accuracy, 0.0, bench.n)
    seen = f"{percent(accuracy)} survive PGD that may change any pixel to any value"
    text = (
        f"{seen}."
        if verdict == "pass"
        else f"{seen}. It could paint an image of another class, so it fails as an attack: look at "
        "M8 and M9, and do not trust its robust accuracy at smaller radii."
    )
    return Finding(verdict, accuracy, text, {"epsilon": whole})


@rule("M4", "a larger radius does not help the model", 0.005)
def monotone(bench):
    radii = [0.0, *(factor * bench.epsilon for factor in _GRID)]
    curve = [bench.accuracy(bench.correct)]
    for factor in _GRID:
        trace = bench.pgd if factor == 1 else bench.run(bench.pgd_of(factor * bench.epsilon))
        curve.append(bench.accuracy(~trace.ever_wrong))
    rises = np.diff(curve)
    at = int(rises.argmax())
    rise = float(max(rises[at], 0.0))
    gone = next((r for r, a in zip(radii, curve, strict=True) if a == 0), None)
    verdict = graded(rise, 0.005, bench.n)
    ends = "does not reach 0 on this grid" if gone is None else f"reaches 0 at {gone:.4g}"
    text = (
        f"Accuracy under PGD falls, or stays, from each radius to the next, and {ends}."
        if verdict == "pass"
        else f"Accuracy under PGD rises by {percent(rise)} from radius {radii[at]:.4g} to "
        f"{radii[at + 1]:.4g}. What breaks an example in a small ball is also in a larger one, so "
        "PGD misses it there: give it more steps and restarts, or a smaller step."
    )
    return Finding(verdict, rise, text, {"epsilon": radii, "accuracy": curve, "zero_at": gone})
