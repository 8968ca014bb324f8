"""What attacks have in common that only ask the model: no gradients, no weights.

They run on the host in NumPy, so that they attack a served model or any function as well as a
Keras model, with the same numbers on every backend; only the model itself is compiled.
"""

from __future__ import annotations

import numpy as np

from keras_emr.geometry import NORMS
from keras_emr.part import Part, non_negative, one_of, whole

# Outputs that an attack needs: logits, or the predicted class alone.
NEEDS = ("scores", "labels")


class QueryAttack(Part):
    """An attack on a model that can only be asked.

    Args:
        epsilon: radius of the ball, in units of [0, 1] images, >= 0; ``None`` (only where
            ``bounded`` is false): any distance counts.
        norm: ``linf`` or ``l2``.
        steps: iterations, >= 1.
        restarts: independent runs, >= 1.
    """

    name = "query"
    needs = "scores"
    evaluation_only = True
    # False: looks for the nearest adversarial image; what lies beyond epsilon does not count.
    bounded = True
    norms = NORMS

    def __init__(self, epsilon, norm="linf", steps=1000, restarts=1):
        free = epsilon is None and not self.bounded
        self.epsilon = None if free else non_negative("epsilon", epsilon)
        self.norm = one_of("norm", norm, self.norms)
        self.steps = whole("steps", steps, 1)
        self.restarts = whole("restarts", restarts, 1)

    def runs(self, classes):
        """Independent runs in an evaluation of a model with so many classes."""
        return self.restarts

    @property
    def queries_per_step(self):
        """About how many queries a step of an unfinished example costs."""
        return 1.0

    def describe(self):
        """Name and every option as plain values, for reports."""
        return {"name": self.name, **self.get_config()}

    def search(self, query, x, y, streams, progress=None):
        """Attack N examples, all of them classified correctly.

        Args:
            query: (M, H, W, C) float32 images -> (M, K) float scores (M anything >= 1; scores of
                a model of which only labels are known are one-hot). Ask only for examples that
                are not finished: the number of images asked for is what an attack costs.
            x: (N, H, W, C) float32 images in [0, 1].
            y: (N,) integer labels.
            streams: N ``numpy.random.Generator``, one per example: every random number of an
                example comes from its own, so that results depend neither on the batch nor on
                the other examples.
            progress: called with the iterations done so far, at most ``steps``.

        Returns:
            ``(x_adv, queries)``: (N, H, W, C) float32, misclassified images or else the clean
            ones, in [0, 1] and, if ``bounded``, within epsilon; (N,) int, images asked for.
        """
        raise NotImplementedError


class Draws:
    """Uniform numbers in [0, 1), a row per example and step, drawn from each one's own stream.

    Args:
        streams: N generators.
        width: numbers per row.
        block: rows drawn from a stream at a time.
    """

    def __init__(self, streams, width, block=64):
        self.streams, self.width, self.block = streams, width, block
        self._rows = np.empty((len(streams), block, width))
        self._used = np.full(len(streams), block)

    def next(self, active):
        """The next rows of the examples with indices ``active``: (len(active), width)."""
        for i in active[self._used[active] == self.block]:
            self._rows[i] = self.streams[i].random((self.block, self.width))
            self._used[i] = 0
        rows = self._rows[active, self._used[active]]
        self._used[active] += 1
        return rows


def margins(y, scores):
    """``z_y - max_{k != y} z_k``: (N,), (N, K) -> (N,). Negative where misclassified.

    Scores that are not finite are no classification: ``-inf``.
    """
    rows = np.arange(len(y))
    finite = np.isfinite(scores).all(axis=1)
    scores = np.where(finite[:, None], scores, 0)
    others = scores.copy()
    others[rows, y] = -np.inf
    return np.where(finite, scores[rows, y] - others.max(axis=1), -np.inf)


def wrong(y, scores):
    """Whether the arg-max class is not ``y``, or scores are not finite: (N,) bool."""
    return (scores.argmax(axis=1) != y) | ~np.isfinite(scores).all(axis=1)
