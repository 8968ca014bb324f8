"""PGD as the checks need it: one compilation for every radius, and a record of each run."""

from __future__ import annotations

import functools
from typing import NamedTuple

import keras
import numpy as np
from keras import ops

from keras_emr import backend
from keras_emr.attacks.base import Objective
from keras_emr.evaluation.batching import in_batches, padded
from keras_emr.geometry import ascent, norm, project
from keras_emr.network import Network
from keras_emr.sampling import ExampleSampler

_SMALLEST = 16


class Trace(NamedTuple):
    """One run of PGD on N examples: arrays (N,), images (N, H, W, C).

    ``images``: the last iterates; ``right``: classified correctly there; ``ever_wrong``:
    misclassified at some iterate, the start and the last included; ``first_right``,
    ``first_loss``, ``first_slope``: at the start, the last being the L1 norm of the gradient;
    ``last_loss``: at the last iterate.
    """

    images: np.ndarray
    right: np.ndarray
    ever_wrong: np.ndarray
    first_right: np.ndarray
    first_loss: np.ndarray
    first_slope: np.ndarray
    last_loss: np.ndarray


class Ascent:
    """The steps of :class:`keras_emr.attacks.pgd.PGD` on one model.

    Radius and step size are arguments of the compiled step, so that a grid of radii is one
    compilation. A random model draws other numbers at each step.

    Args:
        model: Keras classifier.
        kind: ``linf`` or ``l2``.
        batch_size: images at a time; a quarter where there are no more than that.
    """

    def __init__(self, model, kind, batch_size):
        self.network = Network(model)
        self.kind, self.batch_size = kind, batch_size
        self._asked = 0
        self._steps = {
            name: backend.compiled(functools.partial(self._advance, name), model.variables)
            for name in ("cross_entropy", "dlr")
        }
        self._slopes = backend.compiled(self._slope, model.variables)

    def _advance(self, name, x, y, image, ever_wrong, epsilon, step_size, noise):
        objective = Objective(self.network.frozen(noise=noise), name, x, y)
        value, right, gradient = objective.look(image)
        moved = image + step_size * ascent(gradient, self.kind)
        moved = project(moved, x, epsilon, self.kind)
        return moved, ever_wrong | ~right, value, right, norm(gradient, "l1")

    def _slope(self, x, weights):
        objective = Objective(self.network.frozen(), "cross_entropy", x, None)
        return (objective.output_gradient(x, weights),)

    def slope(self, x, weights):
        """Input gradients of ``sum(weights * logits)``: NumPy (N, H, W, C), (N, K) -> like x."""
        return in_batches(self._slopes, self._size(len(x)), x, weights)[0]

    def _size(self, rows):
        quarter = max(self.batch_size // 4, min(_SMALLEST, self.batch_size))
        return quarter if rows <= quarter else self.batch_size

    def run(self, attack, x, y, index, *, restart=0, seed=0, objective="cross_entropy"):
        """Attack N examples: :class:`Trace`.

        Args:
            attack: a PGD, of which radius, steps, step size and start are used.
            x, y: NumPy images and labels.
            index: (N,) their indices in the data set, which decide their random numbers.
            restart, seed: int.
            objective: ``cross_entropy`` or ``dlr``.
        """
        size = self._size(len(x))
        parts = []
        for begin in range(0, len(x), size):
            rows = slice(begin, min(begin + size, len(x)))
            sampler = ExampleSampler(seed, restart, padded(index[rows], size))
            trace = self._batch(
                attack,
                padded(x[rows], size),
                padded(y[rows], size),
                sampler,
                self._steps[objective],
            )
            parts.append([part[: rows.stop - begin] for part in trace])
        return Trace(*(np.concatenate(column) for column in zip(*parts, strict=True)))

    def _batch(self, attack, x, y, sampler, step):
        x, y = ops.convert_to_tensor(x), ops.convert_to_tensor(y)
        sizes = [
            ops.convert_to_tensor(value, dtype=keras.config.floatx())
            for value in (attack.epsilon, attack.alpha)
        ]
        image = attack.begin(None, x, attack.draw(x, sampler))[0]
        ever_wrong = ops.zeros(ops.shape(y), dtype="bool")
        for t in range(attack.steps + 1):
            self._asked += 1
            noise = ops.convert_to_tensor(self._asked, dtype="int32")
            here = image
            image, ever_wrong, value, right, slope = step(x, y, here, ever_wrong, *sizes, noise)
            if t == 0:
                first = right, value, slope
        return [ops.convert_to_numpy(part) for part in (here, right, ever_wrong, *first, value)]
