"""A synthetic report that is valid and consistent, and the images of its gallery."""

from __future__ import annotations

import numpy as np

SEED = 7


def example_report(
    name="toy",
    *,
    n=200,
    classes=10,
    clean=0.9,
    robust=0.45,
    norm="linf",
    epsilon=8 / 255,
    epsilon_text="8/255",
    suite="autoattack",
    complete=True,
    curves=True,
    margins=True,
    seed=SEED,
):
    """A report such as ``keras-emr evaluate`` makes.

    Args:
        name: of the model.
        n, classes: images and classes; image i is of class i mod classes.
        clean, robust: accuracies to come near.
        norm, epsilon, epsilon_text: threat model.
        suite: ``autoattack`` (its four attacks on survivors) or ``individual`` (PGD and Square).
        complete: whether the evaluation ran to its end.
        curves, margins: whether there are any.
        seed: of the made-up outcomes.

    Returns:
        A new dictionary, to be changed at will.
    """
    rng = np.random.default_rng(seed)
    labels = np.arange(n) % classes
    correct = np.arange(n) < round(clean * n)
    robust_ones = np.arange(n) < round(robust * n)
    rng.shuffle(order := np.arange(n))
    correct, survived = correct[order], robust_ones[order]
    wrong = (labels + 1 + rng.integers(0, classes - 1, n)) % classes
    predicted = {
        "clean": np.where(correct, labels, wrong),
        "adversarial": np.where(survived, labels, wrong),
    }
    attacks = _attacks(suite, n, int(correct.sum()), int(survived.sum()))
    full = suite == "autoattack" and complete
    accuracy = {"clean": float(correct.mean()), "robust": float(survived.mean()), "n": n}
    values = _margins(rng, correct, survived, epsilon, norm)
    return {
        "schema": "keras-emr-report/1",
        "created": "2025-01-31T12:00:00+00:00",
        "complete": complete,
        "notes": ["made up for tests"],
        "model": {"name": name, "path": f"runs/{name}/best.keras", "sha256": f"{seed:064x}",
                  "parameters": 312_202},
        "data": {"name": "digits", "sha256": "ab" * 32, "n": n, "classes": classes,
                 "image_shape": [8, 8, 1], "split": "test"},
        "threat_model": {"norm": norm, "epsilon": epsilon, "epsilon_text": epsilon_text,
                         "knowledge": "white box: architecture, weights and gradients"},
        "settings": {"seed": 0, "batch_size": 256, "backend": "tensorflow",
                     "bn_mode": "inference", "attacks": [a["name"] for a in attacks],
                     "margins": {"examples": None, "bins": 20}},
        "accuracy": {**accuracy, "correct": int(correct.sum()), "survived": int(survived.sum())},
        "robustbench": {
            "dataset": "digits",
            "threat_model": norm.capitalize(),
            "eps": epsilon,
            "clean_acc": round(100 * accuracy["clean"], 2),
            "autoattack_acc": round(100 * accuracy["robust"], 2) if full else None,
            "best_known": None,
            "additional_data": None,
            "n": n,
        },
        "attacks": attacks,
        "curves": _curves(clean, robust, epsilon) if curves else dict.fromkeys(
            ("epsilon", "steps", "restarts")
        ),
        "confusion": {at: _confusion(labels, p, classes) for at, p in predicted.items()},
        "margins": _summaries(values, epsilon, norm) if margins else None,
        "per_class": [
            {
                "class": k,
                "n": int((labels == k).sum()),
                "accuracy": _mean(correct[labels == k]),
                "robust_accuracy": _mean(survived[labels == k]),
                "effective_margin_l2": _mean(values["clean"]["l2"][labels == k]) if margins
                else None,
                "effective_margin_linf": _mean(values["clean"]["linf"][labels == k]) if margins
                else None,
                "effective_weight_norm": _mean(values["clean"]["weight_norm"][labels == k])
                if margins else None,
            }
            for k in range(classes)
        ],
        "checks": _checks(),
        "gallery": [
            {
                "index": i,
                "label": int(labels[i]),
                "predicted_clean": int(predicted["clean"][i]),
                "predicted_adversarial": int(predicted["adversarial"][i]),
                "broken_by": attacks[0]["name"] if correct[i] and not survived[i] else None,
                "perturbation": float(epsilon) if correct[i] else 0.0,
            }
            for i in range(min(8, n))
        ],
        "environment": {
            "python": "3.11.2",
            "keras": "3.15.0",
            "tensorflow": "2.20.0",
            "numpy": "2.3.1",
            "keras_emr": "0.1.0",
            "platform": "Linux x86_64",
            "processor": None,
            "devices": ["/device:CPU:0"],
        },
    }  # fmt: skip


def example_images(report, shape=None):
    """Images for the gallery of ``report``: noise, and sign noise of size epsilon on it."""
    rng = np.random.default_rng(SEED)
    epsilon = report["threat_model"]["epsilon"]
    images = []
    for example in report["gallery"]:
        clean = rng.uniform(0, 1, shape or report["data"]["image_shape"]).astype("float32")
        change = epsilon * rng.choice([-1, 1], clean.shape) * (example["perturbation"] > 0)
        adversarial = np.clip(clean + change, 0, 1).astype("float32")
        images.append({"index": example["index"], "clean": clean, "adversarial": adversarial})
    return images


def _attacks(suite, n, correct, survived):
    if suite == "individual":
        left = {"pgd": survived + (correct - survived) // 10, "square": (correct + survived) // 2}
        rows = [("pgd", correct, left["pgd"]), ("apgd", correct, survived)]
        rows.append(("square", correct, left["square"]))
        mode = "individual"
    else:
        first = survived + (correct - survived) // 8
        rows = [("apgd-ce", correct, first), ("apgd-t", first, survived)]
        rows += [("fab-t", survived, survived), ("square", survived, survived)]
        mode = "survivors"
    return [
        {
            "name": name,
            "options": {"steps": 100, "restarts": 1, "loss": {"name": "dlr", "targets": 9}},
            "mode": mode,
            "attacked": attacked,
            "broken": attacked - left,
            "robust_accuracy": left / n,
            "queries": 5000 * attacked if name == "square" else 0,
            "seconds": 12.5,
        }
        for name, attacked, left in rows
    ]


def _curves(clean, robust, epsilon):
    times = np.array([0, 0.25, 0.5, 1, 1.5, 2, 3, 4])
    shares = clean * np.exp(-((times * np.sqrt(np.log(clean / robust))) ** 2))
    steps = [1, 2, 5, 10, 20, 50, 100]
    over_steps = [robust + (clean - robust) * 0.6 / s for s in steps]
    return {
        "epsilon": {"attack": "apgd", "n": 50, "x": (times * epsilon).tolist(),
                    "robust_accuracy": shares.tolist()},
        "steps": {"attack": "pgd", "n": 50, "x": steps, "robust_accuracy": over_steps},
        "restarts": {"attack": "pgd", "n": 50, "x": [1, 2, 5, 10],
                     "robust_accuracy": [robust + 0.02 / r for r in (1, 2, 5, 10)]},
    }  # fmt: skip


def _margins(rng, correct, survived, epsilon, norm):
    """Made-up margins: positive where right, about epsilon where it decides."""
    size = np.abs(rng.normal(1.2, 0.5, len(correct))) + 0.05
    unit = {norm: epsilon, "l2" if norm == "linf" else "linf": epsilon * (8 if norm == "linf"
                                                                          else 1 / 8)}  # fmt: skip
    values = {}
    for at, right, scale in (("clean", correct, 1.0), ("adversarial", survived, 0.4)):
        signed = scale * np.where(right, size, -0.5 * size)
        weights = rng.normal(4.0, 0.6, len(correct)) / np.sqrt(scale)
        values[at] = {"l2": unit["l2"] * signed, "linf": unit["linf"] * signed,
                      "weight_norm": np.abs(weights)}  # fmt: skip
    return values


def _summaries(values, epsilon, norm):
    summaries = {}
    for at, part in values.items():
        summary = {}
        for name, numbers in part.items():
            counts, edges = np.histogram(numbers, bins=20)
            summary[name] = {"edges": edges.tolist(), "counts": counts.tolist()}
        summary["effective_margin_l2"] = _mean(part["l2"])
        summary["effective_margin_linf"] = _mean(part["linf"])
        summary["effective_weight_norm"] = _mean(part["weight_norm"])
        summary["share_above_epsilon"] = float((part[norm] > epsilon).mean())
        summaries[at] = summary
    return summaries


def _confusion(labels, predicted, classes):
    matrix = np.zeros((classes, classes), int)
    np.add.at(matrix, (labels, predicted), 1)
    return matrix.tolist()


def _mean(values):
    return float(np.mean(values)) if len(values) else None


def _checks():
    rows = [
        ("iterative-beats-single", "Iterative attacks beat the single step", "pass", 0.18, 0.005),
        ("unbounded", "An unbounded attack reaches 0 %", "pass", 0.0, 0.0),
        ("monotone", "Accuracy falls with epsilon", "warn", 0.012, 0.005),
        ("transfer", "White box beats transfer", "not run", None, 0.002),
    ]
    text = {
        "pass": "As it should be.",
        "warn": "It rises by 1.2 points between two neighbours: use more steps.",
        "not run": "No other model was given.",
    }
    return [
        {"id": i, "title": title, "verdict": verdict, "value": value, "threshold": threshold,
         "text": text[verdict]}
        for i, title, verdict, value, threshold in rows
    ]  # fmt: skip
