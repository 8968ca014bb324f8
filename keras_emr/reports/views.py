"""What the page says about a report, in words and cells."""

from __future__ import annotations

import json

from keras_emr.reports.compare import VERDICTS, interval, row, worst_verdict

NONE = "\N{EN DASH}"
BOUND = (
    "Robust accuracy found by attacks is an upper bound: attacks can show that an image can be "
    "broken, never that it cannot, and a stronger attack may break more."
)
_SIGNS = {
    "pass": "\N{CHECK MARK}",
    "warn": "!",
    "fail": "\N{BALLOT X}",
    "not run": "\N{WHITE CIRCLE}",
}


def percent(value, n=0):
    """``0.4567`` as ``45.7 %``; two decimals where so many images can tell them."""
    return NONE if value is None else f"{100 * value:.{2 if n >= 1000 else 1}f}\N{NO-BREAK SPACE}%"


def number(value):
    return NONE if value is None else f"{value:.4g}" if isinstance(value, float) else f"{value}"


def ball(threat):
    """The threat model in short: ``Linf, epsilon = 8/255``."""
    return f"{threat['norm'].capitalize()}, epsilon = {threat['epsilon_text']}"


def verdict(checks):
    """Worst verdict of the checks: its level, a sign, and a sentence."""
    worst = worst_verdict(checks)
    counts = {name: sum(c["verdict"] == name for c in checks) for name in VERDICTS}
    total = len(checks)
    text = {
        "fail": f"{counts['fail']} of {total} checks failed: something is wrong with the model or "
        "the attacks, so do not rely on the robust accuracy.",
        "warn": f"{counts['warn']} of {total} checks ask for a closer look before the robust "
        "accuracy is relied on.",
        "pass": f"{counts['pass']} of {total} checks passed.",
        "not run": "No check of the evaluation was run: gradient masking would go unnoticed.",
    }[worst]
    if worst == "fail" and counts["warn"]:
        text += f" {counts['warn']} more ask for a closer look."
    if counts["not run"] and worst != "not run":
        text += f" {counts['not run']} not run."
    return {"level": worst, "sign": _SIGNS[worst], "text": text}


def summary(report):
    """Sentences for somebody who has never seen such a report."""
    accuracy, data, threat = report["accuracy"], report["data"], report["threat_model"]
    n, attacks = accuracy["n"], len(report["attacks"])
    of = f"{n} of the {data['n']}" if n < data["n"] else f"the {n}"
    change = (
        "every pixel value changes by at most"
        if threat["norm"] == "linf"
        else "the change, as a vector, is no longer than"
    )
    size = threat["epsilon_text"]
    if "/" in size:
        size += f" ({threat['epsilon']:.3g})"
    outcome = f"none of the {attacks} attacks found a changed image that it gets wrong"
    if attacks == 1:
        outcome = "the one attack found no changed image that it gets wrong"
    elif attacks == 0:
        outcome = "no attack that ran to its end found a changed image that it gets wrong"
    low, high = interval(accuracy["survived"], n)
    sentences = [
        f"The model was tested on {of} {data['split']} images of {data['name']}. It classifies "
        f"{accuracy['correct']} of them correctly as they are "
        f"({percent(accuracy['clean'], n)}, clean accuracy).",
        f"An attacker may change an image so that {change} {size}, where pixel values run from 0 "
        f"to 1. For {accuracy['survived']} images ({percent(accuracy['robust'], n)} of all, "
        f"robust accuracy) the model is right and {outcome}.",
    ]
    full = report["robustbench"]["autoattack_acc"]
    if full is not None:
        sentences.append(
            "The whole standard AutoAttack suite ran to its end on these images: "
            f"{full:.2f}\N{NO-BREAK SPACE}%."
        )
    sentences.append(
        f"{BOUND} Besides, {n} images are a sample: under the same attacks, over all such images, "
        f"it lies between {percent(low, n)} and {percent(high, n)} "
        "(95\N{NO-BREAK SPACE}% interval)."
    )
    return sentences


def banners(report):
    """Lines that have to be read before the numbers: ``{"level", "text"}``."""
    found = []
    if not report["complete"]:
        found.append(
            {
                "level": "fail",
                "text": "Incomplete: the evaluation was cut short. Attacks that did not run may "
                "break many of the images that count as robust here.",
            }
        )
    if report["robustbench"]["autoattack_acc"] is None:
        found.append(
            {
                "level": "warn",
                "text": "Not full AutoAttack: the robust accuracy here must not be compared with "
                "accuracies under AutoAttack in papers and leaderboards.",
            }
        )
    source = report.get("source")
    if source is not None and min(source["clean"], source["adversarial"]) < 1:
        found.append(
            {
                "level": "warn",
                "text": "The served model and its source give different labels: what is served was "
                "not made from that file, or takes images in another way.",
            }
        )
    return found


def source_rows(report):
    """Of a served model and its source: ``[images, same labels, source is right, served is]``."""
    source = report.get("source")
    if source is None:
        return []
    names = {"clean": "as they are", "adversarial": f"made by {source['attack']} on the source"}
    return [
        [
            name,
            f"{same_labels(source, at)} of {source['n']}",
            percent(source["source_accuracy"][at], source["n"]),
            percent(source["served_accuracy"][at], source["n"]),
        ]
        for at, name in names.items()
    ]


def same_labels(source, at):
    """For how many images, not for which rounded share: one of many counts."""
    return round(source[at] * source["n"])


def attack_rows(report):
    n = report["accuracy"]["n"]
    return [
        {
            **attack,
            "robust": percent(attack["robust_accuracy"], n),
            "share": percent(attack["broken"] / attack["attacked"] if attack["attacked"] else None),
            "time": f"{attack['seconds']:.1f}",
            "asked": attack["queries"] or NONE,
            "text": ", ".join(f"{name} = {text}" for name, text in flat(attack["options"])),
        }
        for attack in report["attacks"]
    ]


def check_rows(report):
    return [
        {
            **check,
            "sign": _SIGNS[check["verdict"]],
            "level": check["verdict"],
            "value": number(check["value"]),
            "threshold": number(check["threshold"]),
        }
        for check in report["checks"]
    ]


def class_rows(report):
    return [
        [
            entry["class"],
            entry["n"],
            percent(entry["accuracy"]),
            percent(entry["robust_accuracy"]),
            number(entry["effective_margin_l2"]),
            number(entry["effective_margin_linf"]),
            number(entry["effective_weight_norm"]),
        ]
        for entry in report["per_class"]
    ]


def margin_rows(report):
    if report["margins"] is None:
        return []
    return [
        [
            at,
            number(part["effective_margin_l2"]),
            number(part["effective_margin_linf"]),
            number(part["effective_weight_norm"]),
            percent(part["share_above_epsilon"]),
        ]
        for at, part in (("clean", report["margins"]["clean"]),
                         ("adversarial", report["margins"]["adversarial"]))
    ]  # fmt: skip


def comparison_rows(names, reports):
    """``(quantity, [cell for each model])``."""
    rows = [row(name, report) for name, report in zip(names, reports, strict=True)]

    def cells(write):
        return [write(one) for one in rows]

    def numbers(name):
        return cells(lambda one: number(one[name]))

    return [
        ("clean accuracy", cells(lambda one: percent(one["clean"], one["n"]))),
        ("robust accuracy (upper bound)", cells(lambda one: percent(one["robust"], one["n"]))),
        ("95 % interval of it", cells(_span)),
        ("under full AutoAttack", cells(_autoattack)),
        ("checks, worst verdict", cells(lambda one: f"{_SIGNS[one['checks']]} {one['checks']}")),
        ("complete", cells(lambda one: "yes" if one["complete"] else "no")),
        ("images", cells(lambda one: one["n"])),
        ("data", cells(lambda one: one["data"])),
        ("threat model", [ball(report["threat_model"]) for report in reports]),
        ("attacks", [", ".join(a["name"] for a in r["attacks"]) or NONE for r in reports]),
        ("effective margin L2, clean", numbers("effective_margin_l2")),
        ("effective margin L2, adversarial", numbers("effective_margin_l2_adversarial")),
        ("effective margin Linf, clean", numbers("effective_margin_linf")),
        ("effective margin Linf, adversarial", numbers("effective_margin_linf_adversarial")),
        ("share with a clean margin above epsilon", cells(_share)),
        ("effective weight norm, clean", numbers("effective_weight_norm")),
        ("parameters", numbers("parameters")),
        ("file, SHA-256", cells(lambda one: (one["sha256"] or NONE)[:12])),
    ]


def _span(one):
    low, high = one["robust_interval"]
    return f"{percent(low, one['n'])} to {percent(high, one['n'])}"


def _autoattack(one):
    return "not run" if one["autoattack_percent"] is None else f"{one['autoattack_percent']:.2f} %"


def _share(one):
    return percent(one["share_above_epsilon"])


def setting_groups(report):
    """``(heading, [(field, text)])``: everything that the numbers depend on."""
    names = {
        "model": "Model",
        "data": "Data",
        "threat_model": "Threat model",
        "settings": "Settings",
        "robustbench": "Entry in the form of RobustBench",
        "environment": "Environment",
    }
    groups = [(heading, flat(report[name])) for name, heading in names.items()]
    about = [(name, _text(report[name])) for name in ("schema", "created", "complete")]
    return [*groups, ("Report", about)]


def flat(values, before=""):
    """Nested values as ``(a.b, text)``."""
    rows = []
    for name, value in values.items():
        if isinstance(value, dict) and value:
            rows += flat(value, f"{before}{name}.")
        else:
            rows.append((before + name, _text(value)))
    return rows


def _text(value):
    if value is None:
        return NONE
    if isinstance(value, str):
        return value
    if isinstance(value, list) and all(isinstance(part, str) for part in value):
        return ", ".join(value) or NONE
    return json.dumps(value, ensure_ascii=False)
