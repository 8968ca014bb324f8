"""Checks of the model alone: whether its outputs and gradients can be attacked as they are."""

from __future__ import annotations

import keras
import numpy as np
from keras import ops

from keras_emr.evaluation.checks.base import Finding, NotRun, rule
from keras_emr.evaluation.checks.bench import RANDOM

_TWO_MODES = (
    keras.layers.AlphaDropout,
    keras.layers.Dropout,
    keras.layers.GaussianDropout,
    keras.layers.GaussianNoise,
)


@rule("M10", "the same image gets the same answer", RANDOM)
def determinism(bench):
    right, apart = bench.random
    passes = bench.budget.passes
    details = {"passes": passes, "correct": right, "images": bench.answers.shape[1]}
    if not bench.is_random:
        text = f"{passes} calls on the same images give the same answers (to {apart:.1g})."
        return Finding("pass", apart, text, details)
    entries = getattr(bench.result, "attacks", None) or []
    passes_of = [entry.get("eot") or 1 for entry in entries if isinstance(entry, dict)]
    details["eot"] = max(passes_of, default=1)
    seen = (
        f"{passes} calls on the same images give different answers (scaled logits differ by up to "
        f"{apart:.2g}, {min(right)} to {max(right)} are right)"
    )
    if details["eot"] > 1:
        text = (
            f"{seen}. The evaluation averaged gradients over {details['eot']} passes: report that "
            "number, and see whether more passes break more."
        )
        return Finding("warn", apart, text, details)
    text = (
        f"{seen}: the model is random, and one gradient is one draw. Average over draws "
        "(AutoAttack version 'rand', or eot=20), or switch the randomness off if it is a mistake."
    )
    return Finding("fail", apart, text, details)


@rule("M11", "training and inference mode differ", 0.0)
def modes(bench):
    if not bench.target.gradients:
        raise NotRun("a function has no modes")
    model = bench.target.model
    layers = [layer.name for layer in model._flatten_layers() if _has_two_modes(layer)]
    if not layers:
        raise NotRun("the model has no BatchNorm or dropout layer in use, hence one mode only")
    batch = ops.convert_to_tensor(bench.x[: bench.batch_size])
    evaluated, trained = (
        ops.convert_to_numpy(bench.target.network.frozen(training)(batch)).astype("float64")
        for training in (False, True)
    )
    apart = float(np.abs(evaluated - trained).max())
    details = {"layers": layers}
    if apart > 1e-6 * np.abs(evaluated).max():
        text = f"Logits in training and inference mode differ (by up to {apart:.2g}), as they must."
        return Finding("pass", apart, text, details)
    text = (
        f"Logits in training and inference mode are the same although the model has {layers[0]!r}: "
        "`training` does not reach it. Which mode was evaluated is unknown; pass it on in `call`."
    )
    return Finding("fail", apart, text, details)


def _has_two_modes(layer):
    if isinstance(layer, keras.layers.BatchNormalization):
        return layer.trainable  # a frozen one is in inference mode always
    rate = getattr(layer, "rate", getattr(layer, "stddev", 0))
    return isinstance(layer, _TWO_MODES) and bool(rate)


@rule("A-probabilities", "outputs are logits", None)
def probabilities(bench):
    target = bench.target
    if target.gradients:
        outputs = bench.answers[0]
    else:
        outputs = np.asarray(target.function(bench.x[: bench.batch_size].astype("float32")))
        if target.gives == "labels":
            raise NotRun("the function gives labels, neither logits nor probabilities")
    inside = (outputs < 1 + 1e-5).all() and (outputs > -1e-5).all()
    off = float(np.abs(outputs.sum(axis=1) - 1).max())
    if not (inside and off < 1e-5):
        return Finding("pass", off, "The outputs are no probabilities.")
    if target.gradients:
        text = (
            "The outputs are probabilities. Their losses lose the gradient where the model is "
            "sure: evaluate the model without its softmax."
        )
        return Finding("fail", off, text)
    text = (
        "The function gives probabilities; attacks work on their logarithms, which are coarse "
        "where the model is very sure. Give logits if you can."
    )
    return Finding("warn", off, text)


@rule("A-classes", "enough classes for the DLR losses", 4)
def classes(bench):
    count = bench.target.classes
    if count >= 4:
        return Finding("pass", count, f"{count} classes: the DLR losses are defined as published.")
    which = "DLR losses are" if count == 2 else "targeted DLR loss is"
    text = (
        f"With {count} classes the {which} not defined and the difference of the logits is used "
        "instead. Say so where you report AutoAttack."
    )
    return Finding("warn", count, text)
