"""Checks of the gradients themselves: whether they are there, and those of the model."""

from __future__ import annotations

import numpy as np

from keras_emr.evaluation.checks.base import Finding, NotRun, percent, rule

# Finite differences: the pixels' change, from where float32 just resolves logits to where the
# kinks of a ReLU network begin to show.
_CHANGES = tuple(10.0 ** (-4 + k / 2) for k in range(5))
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
    x = np.clip(bench.x[:count], _CHANGES[-1], 1 - _CHANGES[-1])
    logits = bench.target.predict(x)
    rows, order = np.arange(count), np.argsort(logits, axis=1)
    first, second = order[:, -1], order[:, -2]
    weights = np.zeros_like(logits)
    weights[rows, first], weights[rows, second] = 1, -1
    gradient = ascent.slope(x, weights).reshape(count, -1).astype("float64")
    signs = np.random.default_rng([bench.seed, 8]).choice([-1.0, 1.0], x.shape)
    slopes, noises = [], []
    for change in _CHANGES:
        high, low = ((x + side * change * signs).astype(x.dtype) for side in (1, -1))
        far, near = bench.target.predict(high), bench.target.predict(low)
        gaps = [(z[rows, first] - z[rows, second]).astype("float64") for z in (far, near)]
        slopes.append((gaps[0] - gaps[1]) / (2 * change))
        rounding = _ROUNDINGS * np.finfo(x.dtype).eps * np.abs(far).max(axis=1)
        noises.append(rounding / (2 * change))
    claimed = (gradient * signs.reshape(count, -1)).sum(axis=1)
    differs, unclear = disagreement(
        np.array(slopes), np.array(noises), claimed, np.linalg.norm(gradient, axis=1)
    )
    share = float((differs > _TOLERANCE).mean())
    seen = f"The gradient differs by more than 5 % from what the logits do at {percent(share)}"
    details = {"points": count, "unclear": float(unclear.mean()), "median": _median(differs)}
    if share <= 0.1:
        return Finding("pass", share, f"{seen} of {count} images.", details)
    text = (
        f"{seen} of {count} images: the model computes another gradient than its own (rounding, a "
        "replaced gradient, a cut). Attack it by queries (Square), or differentiate around it."
    )
    return Finding("fail", share, text, details)


def disagreement(slopes, noises, claimed, lengths):
    """How far a claimed directional derivative is from finite differences, relatively.

    The step is chosen for each point by the differences alone: the one that agrees best with a
    neighbouring one, rounding included, among those that moved the output at all. What rounding
    explains is not counted. Relative to the greater of the difference and the gradient's L2
    length, the usual size of a derivative along random signs: a direction that happens to be
    level says nothing.

    Args:
        slopes: (S, N) central differences, one row per step size, in order.
        noises: (S, N) what rounding may contribute to them.
        claimed: (N,) the gradient's derivatives.
        lengths: (N,) the gradient's L2 norms.

    Returns:
        ``(differs, unclear)``: (N,) float and (N,) bool, where rounding hides 5 % or more.
    """
    apart = np.abs(np.diff(slopes, axis=0))
    none = np.full((1, slopes.shape[1]), np.inf)
    errors = np.minimum(np.concatenate([apart, none]), np.concatenate([none, apart])) + noises
    moved = slopes != 0
    errors = np.where(moved | ~moved.any(axis=0), errors, np.inf)
    # Of equally good steps the longest: the least rounding.
    best = len(errors) - 1 - errors[::-1].argmin(axis=0)
    columns = np.arange(slopes.shape[1])
    slope, noise = slopes[best, columns], noises[best, columns]
    scale = np.maximum(np.maximum(np.abs(slope), lengths), 1e-300)
    differs = np.maximum(np.abs(slope - claimed) - noise, 0) / scale
    return np.where(np.isfinite(differs), differs, np.inf), noise > _TOLERANCE * scale


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
