"""Checks of the images that an evaluation found."""

from __future__ import annotations

import numpy as np

from keras_emr.evaluation.checks.base import Finding, NotRun, graded, percent, rule
from keras_emr.evaluation.session import perturbation


@rule("M12", "adversarial images keep the rules", None)
def feasibility(bench):
    if bench.result is None:
        raise NotRun("it needs the result of an evaluation (result=)")
    images, x = np.asarray(bench.result.x_adv), bench.x
    details = {"shape": list(images.shape), "dtype": str(images.dtype)}
    faults = []
    if images.dtype != x.dtype:
        faults.append(f"their dtype is {images.dtype} and not {x.dtype}")
    largest = None
    if images.shape != x.shape:
        faults.append(f"their shape is {images.shape} and not {x.shape}")
    else:
        flat = images.reshape(len(images), -1).astype("float64")
        bad = ~np.isfinite(flat).all(axis=1)
        outside = ((flat < 0) | (flat > 1)).any(axis=1) & ~bad
        lengths = np.where(bad, 0.0, perturbation(bench.norm, x, np.where(_wide(bad), x, images)))
        far = lengths > bench.epsilon + 1e-6
        largest = float(lengths.max())
        counts = {"not_finite": bad, "outside_box": outside, "outside_ball": far}
        words = ("have NaN or infinite pixels", "have pixels outside [0, 1]", "are too far away")
        for (name, which), word in zip(counts.items(), words, strict=True):
            details[name] = int(which.sum())
            if which.any():
                faults.append(f"{int(which.sum())} {word}")
    details["epsilon"] = bench.epsilon
    if not faults:
        text = (
            f"All images are within the ball: the largest {bench.norm} change is {largest:.6g}, "
            f"{bench.epsilon:.6g} is allowed."
        )
        return Finding("pass", largest, text, details)
    text = (
        f"Of the adversarial images, {'; '.join(faults)}. They are no attack under the stated "
        "rules, and accuracies from them mean nothing: repair the attack."
    )
    return Finding("fail", largest, text, details)


def _wide(rows):
    return rows[:, None, None, None]


@rule("M13", "examples survive rounding to 8 bits", 0.01)
def eight_bit(bench):
    fooled = _broken(bench) & ~bench.right(bench.found)
    if not fooled.any():
        raise NotRun("the result has no image that fools the model")
    rounded = (np.round(bench.found * 255.0) / 255.0).astype(bench.x.dtype)
    lost = fooled & bench.right(rounded)
    attacked = int(bench.flags.correct.sum())
    drop = float(lost.sum() / attacked)
    before = float(fooled.sum() / attacked)
    seen = f"The attack fools {percent(before)}; stored with 8 bits {percent(before - drop)}"
    details = {"success": before, "success_8_bit": before - drop, "lost": int(lost.sum())}
    verdict = graded(drop, 0.01, attacked)
    text = (
        f"{seen}."
        if verdict == "pass"
        else f"{seen}. These images live off float precision and would not survive as image files: "
        "report the attack on rounded images as well."
    )
    return Finding(verdict, drop, text, details)


def _broken(bench):
    return bench.flags.correct & ~bench.flags.robust


@rule("M17", "some examples fool a sibling model", 0.0)
def transfer(bench):
    if not bench.siblings:
        raise NotRun("it needs other models of the same task (siblings=)")
    broken = np.flatnonzero(_broken(bench))
    fooled, judged = np.zeros(len(broken), bool), np.zeros(len(broken), bool)
    if not len(broken):
        raise NotRun("the result has no broken example")
    y = bench.y[broken]
    for sibling in bench.siblings:
        knows = bench.right(bench.x[broken], y, sibling)
        judged |= knows
        fooled |= knows & ~bench.right(bench.found[broken], y, sibling)
    if not judged.any():
        raise NotRun("no sibling classifies any of the broken examples correctly")
    share = float(fooled.sum() / judged.sum())
    seen = f"{int(fooled.sum())} of {int(judged.sum())} adversarial images also fool a sibling"
    details = {"fooled": int(fooled.sum()), "judged": int(judged.sum())}
    if fooled.any():
        return Finding("pass", share, f"{seen} that is right on the clean image.", details)
    text = (
        f"{seen}. Usually some do; that none does is a hint, no proof, that the attack uses a "
        "peculiarity of this model (its rounding, its gradients): see M8 and M13."
    )
    return Finding("warn", share, text, details)
