"""The parity gate: a SavedModel, run as TensorFlow Serving runs it, against the source model."""

from __future__ import annotations

from pathlib import Path

import numpy as np

TOLERANCE = 1e-5  # of the logits, relative to their scale
MARGIN_TOLERANCE = 1e-3  # of effective margins, each relative to itself
# A ReLU that is zero but for rounding bends the gradient, and with it a margin, one way or the
# other: so many images may differ.
MARGIN_OUTLIERS = 0.01
_COMPILED_OPS = ("XlaCallModule", "XlaLaunch", "XlaLaunchV2", "_XlaCompile", "_XlaRun")
_MUST_COMPILE = "_XlaMustCompile"


class ParityError(Exception):
    """The served model is not the source model; nothing is published. The message is one line."""


def compare_logits(expected, got, labels=None):
    """How far logits (N, K) are from those expected: plain dictionary.

    ``relative_difference`` is the largest difference over the largest logit, both in absolute
    value; ``label_flips`` counts images whose label, by default the arg-max, is not that expected.
    """
    expected, got = (np.asarray(v, "float64") for v in (expected, got))
    if expected.shape != got.shape:
        raise ParityError(
            f"parity: the served model gives other outputs. Received: logits {got.shape}. "
            f"Expected {expected.shape}."
        )
    difference, scale = float(np.abs(got - expected).max()), float(np.abs(expected).max())
    if not np.isfinite(got).all():
        difference = float("inf")
    relative = difference / scale if scale else (0.0 if difference == 0 else float("inf"))
    labels = got.argmax(axis=1) if labels is None else labels
    return {
        "images": len(expected),
        "max_difference": difference,
        "scale": scale,
        "relative_difference": relative,
        "label_flips": int((expected.argmax(axis=1) != labels).sum()),
        "tolerance": TOLERANCE,
    }


def compare_margins(expected, got):
    """How far effective margins (N,) are from those expected: plain dictionary.

    Differences are relative to the margin, and below a hundredth of the largest one, to that.
    ``outliers`` is the share that differs by more than the tolerance.
    """
    expected, got = (np.asarray(v, "float64") for v in (expected, got))
    finite = np.isfinite(expected)
    scale = float(np.abs(expected[finite]).max()) if finite.any() else 1.0
    both = finite & np.isfinite(got)
    off = np.where(expected == got, 0.0, np.inf)
    floor = np.maximum(np.abs(expected[both]), max(scale / 100, 1e-30))
    off[both] = np.abs(got[both] - expected[both]) / floor
    return {
        "images": len(expected),
        "median_relative_difference": float(np.median(off)),
        "outliers": float((off > MARGIN_TOLERANCE).mean()),
        "tolerance": MARGIN_TOLERANCE,
        "tolerated_outliers": MARGIN_OUTLIERS,
    }


def require_parity(report):
    """Raise :class:`ParityError` unless a gate's report is within the tolerances."""
    for which in ("logits", "robust_logits"):
        found = report[which]
        if not found["relative_difference"] <= found["tolerance"] or found["label_flips"]:
            raise ParityError(
                "parity: the served model differs from its source. Received: logits differ by "
                f"{found['relative_difference']:.1e} of their scale and {found['label_flips']} "
                f"labels flip on {found['images']} images. Expected at most "
                f"{found['tolerance']:.0e} and none; nothing is published."
            )
    for norm, margins in report["effective_margins"].items():
        if margins["outliers"] > margins["tolerated_outliers"]:
            raise ParityError(
                f"parity: effective margins ({norm}) differ from keras_emr's. Received: "
                f"{margins['outliers']:.1%} of {margins['images']} images by more than "
                f"{margins['tolerance']:g}. Expected at most {margins['tolerated_outliers']:.0%}; "
                "nothing is published."
            )


def require_no_xla(folder):
    """Raise :class:`ParityError` if the SavedModel needs XLA, which TensorFlow Serving turns off.

    Looks at every node and function, those of the function library included.
    """
    from tensorflow.core.protobuf import saved_model_pb2

    saved = saved_model_pb2.SavedModel()
    saved.ParseFromString((Path(folder) / "saved_model.pb").read_bytes())
    found = sorted({culprit for meta in saved.meta_graphs for culprit in _compiled(meta.graph_def)})
    if found:
        raise ParityError(
            "parity: the graph needs XLA, which TensorFlow Serving turns off. Received: "
            f"{', '.join(found[:3])}. Expected no XLA call and no jit_compile=True; nothing is "
            "published."
        )


def _compiled(graph):
    nodes = [*graph.node]
    for function in graph.library.function:
        if _MUST_COMPILE in function.attr and function.attr[_MUST_COMPILE].b:
            yield f"function {function.signature.name} with {_MUST_COMPILE}"
        nodes += function.node_def
    for node in nodes:
        if node.op in _COMPILED_OPS:
            yield f"node {node.name} ({node.op})"
        elif _MUST_COMPILE in node.attr and node.attr[_MUST_COMPILE].b:
            yield f"node {node.name} with {_MUST_COMPILE}"
