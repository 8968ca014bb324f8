"""Effective margins: how far, to first order, an image is from the decision boundary."""

from __future__ import annotations

from dataclasses import dataclass

import keras
import numpy as np
from keras import ops

from keras_emr import backend
from keras_emr.data.stored import StoredImages
from keras_emr.evaluation.batching import in_batches
from keras_emr.evaluation.inputs import require_classifier
from keras_emr.geometry import norm as norm_of
from keras_emr.losses import one_hot, pick, widen
from keras_emr.network import Network

# Classes up to which the rivals' gradients are unrolled: twice as fast as a loop, as many times the
# graph.
_UNROLLED = 32


@dataclass(frozen=True)
class Margins:
    """Per-example quantities, each (N,) float.

    ``l2`` and ``linf``: effective margin ``min_{j != y} (z_y - z_j) / ||w_y - w_j||_q`` with q = 2
    and q = 1, the distance to the boundary of the current linear region in that norm, negative
    where misclassified. ``weight_norm``: ``||w_yhat||_2`` of the predicted class.
    """

    l2: np.ndarray
    linf: np.ndarray
    weight_norm: np.ndarray


def boundary_distances(logits, pullback, y):
    """The effective margins of :class:`Margins`, from K - 1 input gradients: ``(l2, linf)``.

    Args:
        logits: (N, K) tensor.
        pullback: of ``logits`` to the images, as :func:`keras_emr.backend.vjp` gives it.
        y: (N,) integer tensor.

    Returns:
        Two tensors (N,).
    """
    classes = logits.shape[-1]
    y = ops.cast(y, "int32")

    def nearer(k, nearest):
        rival = (y + k + 1) % classes
        gradient = pullback(one_hot(y, logits) - one_hot(rival, logits))
        gap = pick(logits, y) - pick(logits, rival)
        return tuple(
            ops.minimum(least, _distance(gap, norm_of(gradient, dual)))
            for least, dual in zip(nearest, ("l2", "l1"), strict=True)
        )

    far = ops.full_like(logits[:, 0], float("inf"))
    return backend.loop(classes - 1, nearer, (far, far), unroll=classes <= _UNROLLED)


class MarginMeter:
    """Measures a model again and again, compiled once: ``meter(x, y) -> Margins``.

    K input gradients per batch: one per rival class and one for the predicted class.

    Args:
        model: Keras classifier to logits.
        batch_size: images at a time.
        between: called before every batch, if given.
    """

    def __init__(self, model, batch_size=256, between=None):
        self.batch_size, self.between = batch_size, between
        self._compiled = backend.compiled(self._batch, model.variables)
        self._network = Network(model)

    def _batch(self, x, y):
        logits, _, pullback = backend.vjp(lambda x: (widen(self._network.frozen()(x)), ()), x)
        predicted = one_hot(ops.argmax(logits, axis=-1), logits)
        return *boundary_distances(logits, pullback, y), norm_of(pullback(predicted), "l2")

    def __call__(self, x, y):
        """Margins of images (N, H, W, C) in [0, 1] with labels (N,)."""
        if not isinstance(x, StoredImages):  # which are read batch by batch
            x = np.asarray(x, keras.config.floatx())
        y = np.asarray(y, "int32")
        l2, linf, weight_norm = in_batches(self._next, min(self.batch_size, len(x)), x, y)
        return Margins(l2, linf, weight_norm)

    def _next(self, x, y):
        if self.between is not None:
            self.between()
        return self._compiled(x, y)


def effective_margins(model, x, y, batch_size=256):
    """Effective margins and weight norms of ``model``: :class:`Margins`.

    Exact minimum over the K - 1 rival classes. Exact distances for a linear model; for a network
    a first-order estimate. Source: ``z_k(x) = w_k(x)^T x + b_k(x)`` of Liu & Chan (BMVC 2022);
    our reading of the definition, the paper's body was not available to us.

    Args:
        model: Keras classifier to logits.
        x: (N, H, W, C) images in [0, 1].
        y: (N,) integer labels.

    Raises:
        UserError: the model takes other images, or does not end in logits.
    """
    require_classifier(model, np.shape(x)[1:])
    return MarginMeter(model, batch_size)(x, y)


def summarize(margins, epsilon, norm="linf", bins=20):
    """Means, histogram and the share of examples with a margin above ``epsilon``.

    Where the input gradient is zero the boundary is infinitely far: such examples count in the
    share, not in means and histograms; the mean is ``None`` if there are no others.

    Args:
        margins: :class:`Margins`.
        epsilon, norm: threat model that the share is taken for.
        bins: of the histograms, between the smallest and the largest finite margin.

    Returns:
        Plain dictionary, ready for JSON.
    """
    summary = {
        "effective_margin_l2": _finite_mean(margins.l2),
        "effective_margin_linf": _finite_mean(margins.linf),
        "effective_weight_norm": float(margins.weight_norm.mean()),
        "share_above_epsilon": float((getattr(margins, norm) > epsilon).mean()),
        "epsilon": float(epsilon),
        "norm": norm,
        "n": len(margins.l2),
    }
    for name in ("l2", "linf"):
        values = getattr(margins, name)
        counts, edges = np.histogram(values[np.isfinite(values)], bins=bins)
        summary[f"histogram_{name}"] = {"counts": counts.tolist(), "edges": edges.tolist()}
    return summary


def margin_summary(model, x, y, epsilon, norm="linf", batch_size=256):
    """:func:`effective_margins`, summarised by :func:`summarize`."""
    return summarize(effective_margins(model, x, y, batch_size), epsilon, norm)


def _distance(gap, norm):
    """``gap / norm``; where the gradient is zero the boundary is infinitely far, or right here."""
    nowhere = ops.where(gap > 0, float("inf"), ops.where(gap < 0, -float("inf"), gap))
    return ops.where(norm > 0, gap / ops.where(norm > 0, norm, ops.ones_like(norm)), nowhere)


def _finite_mean(values):
    """Mean of the finite values; ``None`` where there is none."""
    finite = values[np.isfinite(values)]
    return float(finite.mean()) if len(finite) else None
