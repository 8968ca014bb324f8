"""An attack at work on a target: a batch of examples in, what was found out."""

from __future__ import annotations

import math
import time
from typing import NamedTuple

import numpy as np

from keras_emr import backend
from keras_emr.attacks.query import QueryAttack, wrong
from keras_emr.errors import UserError
from keras_emr.evaluation.attack_run import AttackRun
from keras_emr.sampling import example_streams


class InfeasibleAttack(AssertionError):
    """An attack returned an image outside its threat model: a bug, never a result."""


class Found(NamedTuple):
    """``images`` (N, H, W, C), ``broken`` (N,) bool, ``loss`` (N,), ``queries`` in all."""

    images: np.ndarray
    broken: np.ndarray
    loss: np.ndarray
    queries: int


def open_session(target, attack, batch_size):
    """The session for ``attack``. Raises :class:`UserError` if the target cannot give its need."""
    if isinstance(attack, QueryAttack):
        return QuerySession(target, attack)
    if not target.gradients:
        raise UserError(
            f"attack {attack.name!r} needs gradients. Received: a function. Expected a Keras "
            "model, or an attack that only asks: square, nes, spsa, hopskipjump, boundary, "
            "sign-opt, transfer."
        )
    return GradientSession(target, attack, batch_size)


def portions(session, index):
    """``index`` (N,) in parts of the size that the session wants next."""
    begin = 0
    while begin < len(index):
        end = begin + session.chunk
        yield index[begin:end]
        begin = end


class GradientSession:
    """Batches of one shape, or of a smaller one where few examples are left of a long attack."""

    # Gradients that an example costs at most, from where a step compiled for a quarter of the
    # images, or for a half, is soon paid for.
    _SMALLEST, _QUARTER, _HALF = 16, 100, 400

    def __init__(self, target, attack, batch_size):
        self.target, self.attack = target, attack
        self.chunk = batch_size  # examples for the next call of `find`, at most
        self._run = AttackRun(target.model, attack, batch_size)

    def _shape(self, rows):
        """Rows of the batch that so many examples travel in."""
        size, passes = self.chunk, self.attack.steps * self.attack.runs(self.target.classes)
        if passes < self._QUARTER:
            return size
        if backend.SHAPES_COMPILED < math.inf:
            return rows
        share = 2 if passes >= self._HALF else 4
        while size // share >= max(rows, self._SMALLEST):
            size //= share
        return size

    def find(self, x, y, index, run, seed, tick=None):
        """Attack at most ``chunk`` examples that are classified correctly: :class:`Found`.

        Args:
            x, y: NumPy images and labels.
            index: their indices in the data set, which decide their random numbers.
            run, seed: int.
            tick: called after every step with the share done; may raise.
        """
        images, loss = self._run.attack_batch(x, y, index, run, seed, tick, self._shape(len(x)))
        images = within(self.attack, x, images)
        require_feasible(self.attack, x, images)
        return Found(images, wrong(y, self.target.predict(images)), loss, 0)


class QuerySession:
    """The target is only asked. As many examples at a time as take a minute: a kill loses them.

    The first ones by how fast the target has been, the others by how long the last ones took.
    """

    _LEAST, _SECONDS = 32, 60.0

    def __init__(self, target, attack):
        self.target, self.attack = target, attack
        self._plan(attack.steps * attack.queries_per_step * target.pace)

    def _plan(self, seconds):
        """``seconds``: of one example."""
        most = self.target.batch_size
        fitting = self._SECONDS / max(seconds, 1e-6)
        self.chunk = int(np.clip(fitting, min(self._LEAST, most), most))

    def find(self, x, y, index, run, seed, tick=None):
        """As :meth:`GradientSession.find`; the loss is 0 where unbroken, infinite where broken."""
        if self.attack.needs == "scores" and getattr(self.target, "gives", None) == "labels":
            raise UserError(
                f"attack {self.attack.name!r} needs scores. Received: a function that gives "
                "labels. Expected logits or probabilities, or one of: hopskipjump, boundary, "
                "sign-opt."
            )
        began = time.perf_counter()
        images, queries = self.attack.search(
            self.target.predict,
            x,
            y,
            example_streams(seed, run, index),
            tick and (lambda done: tick(min(done / self.attack.steps, 1.0))),
        )
        self._plan((time.perf_counter() - began) / len(x))
        images = within(self.attack, x, images)
        require_feasible(self.attack, x, images)
        broken = wrong(y, self.target.predict(images))
        return Found(images, broken, np.where(broken, np.inf, 0.0), int(queries.sum()))


def perturbation(norm, x, x_adv):
    """Norms (N,) of ``x_adv - x``, in float64."""
    norms = np.empty(len(x))
    for begin in range(0, len(x), 256):  # float64 copies of a few, not of all
        rows = slice(begin, begin + 256)
        delta = (x_adv[rows].astype("float64") - x[rows]).reshape(len(x[rows]), -1)
        norms[rows] = np.abs(delta).max(1) if norm == "linf" else np.linalg.norm(delta, axis=1)
    return norms


def within(attack, x, images):
    """``images``, but the clean one where a minimum-norm attack found nothing near enough.

    What an L2 attack in a ball leaves by the rounding of its projection is taken back.
    """
    if attack.epsilon is None:
        return images
    if getattr(attack, "bounded", True):
        if attack.norm != "l2" or not np.isfinite(images).all():
            return images
        size = perturbation("l2", x, images)
        out = (size > attack.epsilon) & (size <= attack.epsilon * (1 + 1e-5))
        if not out.any():
            return images
        scale = np.where(out, attack.epsilon * (1 - 1e-6) / np.maximum(size, 1e-30), 1.0)
        back = x + (images - x) * scale[:, None, None, None]
        return np.where(out[:, None, None, None], np.clip(back, 0, 1), images).astype(images.dtype)
    far = perturbation(attack.norm, x, images) > attack.epsilon
    return np.where(far[:, None, None, None], x, images)


def require_feasible(attack, x, images):
    """Raise :class:`InfeasibleAttack` unless ``images`` are within the threat model."""
    if images.shape != x.shape or images.dtype != x.dtype:
        raise InfeasibleAttack(
            f"{attack!r} returned {images.dtype} images {images.shape} for {x.dtype} {x.shape}"
        )
    if not np.isfinite(images).all():
        raise InfeasibleAttack(f"{attack!r} returned NaN or infinite pixels")
    largest = float(perturbation(attack.norm, x, images).max())
    epsilon = np.inf if attack.epsilon is None else attack.epsilon
    if largest > epsilon + 1e-6 or images.min() < 0 or images.max() > 1:
        raise InfeasibleAttack(
            f"{attack!r} left its threat model: {attack.norm} norm {largest:.8f}, pixels in "
            f"[{images.min()}, {images.max()}]"
        )
