"""Checks of the gradients themselves: whether they are there, and those of the model."""

from __future__ import annotations

import numpy as np

from keras_emr.evaluation.checks.base import Finding, NotRun, percent, rule

# M8: half the length of the path that every pixel takes, and places where gradients are taken.
_HALF_PATH, _PLACES = 0.01, 32
_TOLERANCE = 0.05
# Rounding errors of a logit, in units of the last place.
_ROUNDINGS = 8
_NO_SLOPE = 1e-12


@rule("M8", "gradients agree with finite differences", 0.1)
def gradient_correctness(bench):
    ascent = bench.ascent
    if bench.is_random:
        raise NotRun("the model is random (M10), so differences of its outputs mean nothing")
    count = min(bench.budget.gradient_points, bench.n)
    # Away from 0 and 1, where a model that clips its input has a kink.
    x = np.clip(bench.x[:count], _HALF_PATH, 1 - _HALF_PATH)
    signs = np.random.default_rng([bench.seed, 8]).choice([-1.0, 1.0], x.shape)
    logits = bench.target.predict(x)
    rows, order = np.arange(count), np.argsort(logits, axis=1)
    first, second = order[:, -1], order[:, -2]
    weights = np.zeros_like(logits)
    weights[rows, first], weights[rows, second] = 1, -1

    def at(places):
        return np.concatenate([x + _HALF_PATH * t * signs for t in places]).astype(x.dtype)

    ends = bench.target.predict(at((-1, 1))).astype("float64")
    gaps = (weights * ends.reshape(2, *weights.shape)).sum(axis=2)
    slopes = (gaps[1] - gaps[0]) / (2 * _HALF_PATH)
    rounding = _ROUNDINGS * np.finfo(x.dtype).eps * np.abs(ends).reshape(2, count, -1).max((0, 2))
    middles = (2 * np.arange(_PLACES) + 1) / _PLACES - 1
    gradients = ascent.slope(at(middles), np.tile(weights, (_PLACES, 1)))
    gradients = gradients.astype("float64").reshape(_PLACES, count, -1)
    differs = disagreement(slopes, rounding / (2 * _HALF_PATH), gradients, signs.reshape(count, -1))
    share = float((differs > _TOLERANCE).mean())
    seen = f"The gradient differs by more than 5 % from what the logits do at {percent(share)}"
    details = {"points": count, "median": _median(differs)}
    if share <= 0.1:
        return Finding("pass", share, f"{seen} of {count} images.", details)
    text = (
        f"{seen} of {count} images: the model computes another gradient than its own (rounding, a "
        "replaced gradient, a cut). Attack it by queries (Square), or differentiate around it."
    )
    return Finding("fail", share, text, details)


def disagreement(slopes, noises, gradients, directions):
    """How far gradients are from what an output does along a path, relatively.

    A difference of values is the integral of the derivative between: so gradients are averaged
    over the path, and its kinks (ReLU, ties in max-pooling) do no harm. What rounding explains is
    not counted. Relative to the greater of the difference and the gradients' L2 length, the usual
    size of a derivative along random signs: a direction that happens to be level says nothing.

    Args:
        slopes: (N,) differences of the output over the path, per unit of ``directions``.
        noises: (N,) what rounding may contribute to them.
        gradients: (P, N, D) in the middles of P equal pieces of the path.
        directions: (N, D) of the path.

    Returns:
        (N,) float; infinite where something is not finite.
    """
    with np.errstate(invalid="ignore", over="ignore"):
        claimed = (gradients * directions).sum(axis=2).mean(axis=0)
        lengths = np.linalg.norm(gradients, axis=2).mean(axis=0)
        scale = np.maximum(np.maximum(np.abs(slopes), lengths), 1e-300)
        differs = np.maximum(np.abs(slopes - claimed) - noises, 0) / scale
    return np.where(np.isfinite(differs), differs, np.inf)


def _median(values):
    middle = float(np.median(values))
    return middle if np.isfinite(middle) else None


@rule("M9", "gradients are there", 0.01)
def gradient_size(bench):
    # The first look of a run is at its start; that of FGSM is the clean image.
    attack = bench.pgd_of(bench.epsilon, 1)
    attack = type(attack)(**{**attack.get_config(), "start": "none"})
    traces = {
        "cross_entropy_clean": bench.fgsm,
        "cross_entropy_start": bench.pgd,
        "dlr_clean": bench.run(attack, objective="dlr"),
        "dlr_start": bench.dlr,
    }
    shares, exact, broken = {}, {}, 0.0
    for name, trace in traces.items():
        # At a start that is misclassified the attack is over, and the DLR loss may be level.
        slopes = trace.first_slope[trace.first_right]
        values = trace.first_loss[trace.first_right]
        count = max(len(slopes), 1)
        none = slopes < _NO_SLOPE
        if name.startswith("cross_entropy"):
            # The probability of the class rounds to 1; what is left of the gradient is rounding.
            none |= values <= np.finfo(values.dtype).eps / 2
        shares[name] = float(none.sum() / count)
        exact[name] = float((slopes == 0).sum() / count)
        bad = ~(np.isfinite(slopes) & np.isfinite(values))
        broken = max(broken, float(bad.sum() / count))
    entropy = max(shares["cross_entropy_clean"], shares["cross_entropy_start"])
    dlr = max(shares["dlr_clean"], shares["dlr_start"])
    value = max(entropy, dlr, broken)
    details = {**shares, "exactly_zero": exact, "not_finite": broken}
    if broken > 0:
        text = (
            f"Loss or gradient is NaN or infinite at {percent(broken)} of the images. Attacks "
            "stop there: repair the model, or take another checkpoint."
        )
        return Finding("fail", value, text, details)
    if dlr > 0.01:
        text = (
            f"No gradient to follow at {percent(dlr)} of the images, whatever the loss. Attacks "
            "that need it do nothing there, so the model seems robust: use queries (Square)."
        )
        return Finding("fail", value, text, details)
    if entropy > 0.01:
        text = (
            f"The cross-entropy has no usable gradient at {percent(entropy)} of the images, only "
            "the DLR loss has: the logits are so large that the softmax rounds to 1. Attack the "
            "DLR or margin loss, and see M6."
        )
        return Finding("warn", value, text, details)
    return Finding("pass", value, f"No gradient at {percent(value)} of the images.", details)
