"""Several reports beside each other: names, the rows of the table, and what cannot be compared."""

from __future__ import annotations

import math

VERDICTS = ("fail", "warn", "pass", "not run")


def titles(reports):
    """What to call the models: their names, numbered where two are the same."""
    names = [report["model"]["name"] for report in reports]
    seen: dict[str, int] = {}
    given = []
    for name in names:
        seen[name] = seen.get(name, 0) + 1
        given.append(f"{name} ({seen[name]})" if names.count(name) > 1 else name)
    return given


def worst_verdict(checks):
    """``fail``, ``warn``, ``pass``, or ``not run`` if no check ran."""
    found = {check["verdict"] for check in checks}
    return next((verdict for verdict in VERDICTS if verdict in found), "not run")


def interval(count, n, z=1.959964):
    """Wilson's 95 % interval for a share: what another sample of n images could have given.

    Args:
        count: successes.
        n: of so many, at least 1.
        z: quantile of the normal distribution.

    Returns:
        ``(low, high)``.
    """
    share = count / n
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(0.0, middle - half), min(1.0, middle + half)


def row(title, report):
    """A report in one line of a comparison, as plain values.

    Args:
        title: name of the model.
        report: its report.

    Returns:
        Dictionary, ready for JSON.
    """
    accuracy, threat = report["accuracy"], report["threat_model"]
    clean, adversarial = (
        (report["margins"] or {}).get(at) or {} for at in ("clean", "adversarial")
    )
    return {
        "model": title,
        "clean": accuracy["clean"],
        "robust": accuracy["robust"],
        "robust_interval": list(interval(accuracy["survived"], accuracy["n"])),
        "autoattack_percent": report["robustbench"]["autoattack_acc"],
        "n": accuracy["n"],
        "norm": threat["norm"],
        "epsilon": threat["epsilon"],
        "epsilon_text": threat["epsilon_text"],
        "data": report["data"]["name"],
        "complete": report["complete"],
        "checks": worst_verdict(report["checks"]),
        "effective_margin_l2": clean.get("effective_margin_l2"),
        "effective_margin_linf": clean.get("effective_margin_linf"),
        "effective_margin_l2_adversarial": adversarial.get("effective_margin_l2"),
        "effective_margin_linf_adversarial": adversarial.get("effective_margin_linf"),
        "effective_weight_norm": clean.get("effective_weight_norm"),
        "share_above_epsilon": clean.get("share_above_epsilon"),
        "parameters": report["model"]["parameters"],
        "sha256": report["model"]["sha256"],
    }


def differences(reports):
    """Why the reports cannot be compared number by number: one line for each reason."""
    threat = [report["threat_model"] for report in reports]
    data = [report["data"] for report in reports]
    found = []

    def differ(what, values, consequence):
        if len(set(values)) > 1:
            shown = ", ".join(str(value) for value in dict.fromkeys(values))
            found.append(f"{what}: {shown}. {consequence}")

    differ(
        "Different threat models",
        [f"{t['norm'].capitalize()} {t['epsilon_text']}" for t in _unify(threat)],
        "Robust accuracies are of different problems.",
    )
    differ(
        "Different knowledge of the attacker",
        [t["knowledge"] for t in threat],
        "Robust accuracies are of different problems.",
    )
    differ(
        "Different data",
        [f"{d['name']} {d['split']} {(d['sha256'] or '')[:8]}".strip() for d in data],
        "All numbers are of different images.",
    )
    differ(
        "Different numbers of images",
        [report["accuracy"]["n"] for report in reports],
        "The chance in the numbers differs, too.",
    )
    differ(
        "Some evaluations were cut short",
        ["complete" if report["complete"] else "incomplete" for report in reports],
        "Robust accuracy falls with every further attack.",
    )
    differ(
        "Different attacks",
        [" + ".join(a["name"] for a in report["attacks"]) or "none" for report in reports],
        "Robust accuracies are upper bounds, and these are not equally tight.",
    )
    return found


def _unify(threats):
    """8/255 and 0.0313725 are one epsilon if they are one number."""
    texts = {}
    for threat in threats:
        text = texts.setdefault((threat["norm"], threat["epsilon"]), threat["epsilon_text"])
        yield {**threat, "epsilon_text": text}
