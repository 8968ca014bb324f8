"""One model's figures on one data set: clean and robust accuracy, effective margins."""

from __future__ import annotations

import time

from keras_emr.evaluation.margins import margin_summary
from keras_emr.evaluation.robust_accuracy import evaluate_attack


def scorecard(model, attack, x, y, *, batch_size=256, seed=0, progress=None):
    """Judge ``model`` with ``attack`` and measure its effective margins at the clean images.

    Args:
        model, attack, x, y, batch_size, seed, progress: see :func:`evaluate_attack`.

    Returns:
        Plain dictionary, ready for JSON: ``accuracy``, ``robust_accuracy``, ``n``,
        ``max_perturbation``, ``margins`` (:func:`summarize`), ``attack`` (its name and every
        option), ``seed`` and ``seconds``.
    """
    began = time.perf_counter()
    result = evaluate_attack(
        model, attack, x, y, batch_size=batch_size, seed=seed, progress=progress
    )
    margins = margin_summary(model, x, y, attack.epsilon, attack.norm, batch_size)
    return {
        "accuracy": result.accuracy,
        "robust_accuracy": result.robust_accuracy,
        "n": len(result.robust),
        "max_perturbation": result.max_perturbation,
        "margins": margins,
        "attack": describe_attack(attack),
        "bn_mode": "inference",
        "seed": seed,
        "seconds": round(time.perf_counter() - began, 3),
    }


def describe_attack(attack):
    """Name and every option of ``attack`` as they were in force in an evaluation."""
    return attack.with_defaults(objective="cross_entropy", start="uniform").describe()
