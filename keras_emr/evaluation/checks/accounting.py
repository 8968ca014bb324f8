"""Checks of how an evaluation counts."""

from __future__ import annotations

import numpy as np

from keras_emr.evaluation.checks.base import Finding, NotRun, percent, rule

# Images that two ways to compute the same logits may classify differently.
_BORDERLINE = 0.01


@rule("M14", "attacks are merged example by example", 0.0)
def ensemble(bench):
    flags, entries = bench.flags, getattr(bench.result, "attacks", None) or []
    if len(entries) < 2:
        raise NotRun("the result is not of several attacks, so there is nothing to merge")
    reported = float(flags.robust.mean())
    averages = [_accuracy(entry) for entry in entries]
    smallest = min((a for a in averages if a is not None), default=None)
    worst = smallest
    if all("robust" in entry for entry in entries):
        left = flags.correct & np.all([np.asarray(e["robust"], bool) for e in entries], axis=0)
        worst = float(left.mean())
    elif all("broken" in entry for entry in entries):
        worst = float((flags.correct.sum() - sum(e["broken"] for e in entries)) / bench.n)
    if worst is None:
        raise NotRun("the result does not say what its attacks found")
    excess = reported - worst
    details = {"reported": reported, "worst_case": worst, "smallest_average": smallest}
    seen = f"The result says that {percent(reported)} survive all {len(entries)} attacks"
    if abs(excess) < 1e-9:
        return Finding("pass", excess, f"{seen}, and so say its attacks together.", details)
    text = (
        f"{seen}; example by example it is {percent(worst)}. An example counts as robust only if "
        "no attack breaks it: merge the attacks by example, not by their averages."
    )
    return Finding("fail", excess, text, details)


def _accuracy(entry):
    if "robust_accuracy" in entry:
        return float(entry["robust_accuracy"])
    return float(np.mean(entry["robust"])) if "robust" in entry else None


@rule("M18", "examples are counted correctly", 0)
def accounting(bench):
    if bench.result is None:
        raise NotRun("it needs the result of an evaluation (result=)")
    faults, details, wrong = [], {}, 0
    correct, robust = (np.asarray(getattr(bench.result, n)) for n in ("correct", "robust"))
    if correct.shape != (bench.n,) or robust.shape != (bench.n,):
        wrong += abs(len(robust) - bench.n) or bench.n
        faults.append(f"flags for {len(robust)} examples where there are {bench.n}")
    else:
        impossible = int((robust & ~correct).sum())
        details["wrong_but_robust"] = impossible
        if impossible:
            faults.append(f"{impossible} that are wrong without any attack count as robust")
        wrong += impossible + _contradictions(bench, faults, details)
    for name, flags in (("accuracy", correct), ("robust_accuracy", robust)):
        reported = getattr(bench.result, name, None)
        if reported is None:
            continue
        expected = float(flags.sum() / bench.n)
        details[name] = {"reported": float(reported), "expected": expected}
        if abs(reported - expected) > 1e-6:
            wrong += max(1, round(abs(reported - expected) * bench.n))
            faults.append(
                f"{name} is {percent(reported)} where {int(flags.sum())} of {bench.n} is "
                f"{percent(expected)}"
            )
    if not faults:
        text = f"All {bench.n} examples are in the denominator, and wrong ones are not robust."
        return Finding("pass", 0, text, details)
    text = (
        f"The result counts wrongly: {'; '.join(faults)}. Divide by all examples, and count one "
        "as robust only if it is right clean and under every attack."
    )
    return Finding("fail", wrong, text, details)


def _contradictions(bench, faults, details):
    """How many flags the model itself contradicts, unless they are few or it is random."""
    if bench.is_random:
        return 0
    flags = bench.flags
    clean = flags.correct != bench.correct
    details["clean_contradicted"] = int(clean.sum())
    total = 0
    if clean.mean() > _BORDERLINE:
        total += int(clean.sum())
        faults.append(f"{int(clean.sum())} clean images are judged otherwise by the model")
    try:
        survives = bench.right(bench.found)
    except NotRun:
        return total
    claimed = (flags.correct & ~flags.robust & survives) | (flags.robust & ~survives)
    details["adversarial_contradicted"] = int(claimed.sum())
    if claimed.mean() > _BORDERLINE:
        total += int(claimed.sum())
        faults.append(f"{int(claimed.sum())} adversarial images are judged otherwise by the model")
    return total


@rule("M19", "attack accuracy is above the certified one", 0.0)
def certificate(bench):
    if bench.certified is None:
        raise NotRun("it needs a certified accuracy (certified=)")
    if bench.result is None:
        robust, by = bench.white_box, "PGD"
    else:
        robust, by = bench.flags.robust, "the attacks"
    certified = np.asarray(bench.certified)
    accuracy, verified = float(robust.mean()), float(certified.mean())
    value = accuracy - verified
    details = {"attack": accuracy, "certified": verified}
    contradicted = value < -1e-9
    if certified.ndim:
        details["contradicted"] = int((certified.astype(bool) & ~robust).sum())
        contradicted |= details["contradicted"] > 0
    seen = f"{percent(accuracy)} survive {by}, {percent(verified)} are certified"
    if not contradicted:
        text = f"{seen}. The true robust accuracy is between the two."
        return Finding("pass", value, text, details)
    text = (
        f"{seen}. A certified example cannot be broken: the attack leaves its rules (M12), or the "
        "certificate is for other examples, another radius, or wrong."
    )
    return Finding("fail", value, text, details)


@rule("A-square", "queries find little that gradients left", 0.002)
def square_flag(bench):
    entries = getattr(bench.result, "attacks", None) or []
    names = [str(entry.get("name", "")) for entry in entries]
    at = next((i for i, name in enumerate(names) if name.startswith("square")), None)
    if not at:
        raise NotRun("it needs the result of an evaluation that ran Square after other attacks")
    before = min([float(bench.flags.correct.mean()), *map(_accuracy, entries[:at])])
    drop = before - _accuracy(entries[at])
    details = {"before": before, "after": before - drop}
    if drop <= 0.002 + 1e-9:
        text = f"Square lowered the robust accuracy by {percent(max(drop, 0))}: nothing unusual."
        return Finding("pass", drop, text, details)
    text = (
        f"Square, which sees no gradients, lowered the robust accuracy by {percent(drop)} after "
        "attacks that do. The evaluation may be unreliable: use more queries and restarts, or an "
        "attack made for this defence."
    )
    return Finding("warn", drop, text, details)
