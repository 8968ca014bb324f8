"""DeepFool (Moosavi-Dezfooli et al., CVPR 2016)."""

from typing import Any, NamedTuple

from keras import ops

from keras_emr import losses
from keras_emr.attacks.hyperplane import nearest_boundary, survey
from keras_emr.attacks.minimum_norm import MinimumNormAttack, nearer
from keras_emr.geometry import per_example
from keras_emr.part import non_negative, register, whole

_TINY = 1e-8
_BEYOND = 1e-4


class State(NamedTuple):
    """State of a run."""

    image: Any  # (N, H, W, C): where the next step starts
    total: Any  # the sum of the steps so far, without overshoot and box
    best: Any  # the misclassified image, if there is one, else ``x``
    distance: Any  # (N,) its distance, ``inf`` if there is none
    rivals: Any  # (N, R) int32 classes that are looked at


@register
class DeepFool(MinimumNormAttack):
    """DeepFool: steps onto the nearest linearised boundary until the label is lost.

    With ``f_k = z_k - z_y`` and ``w_k`` its input gradient, for the rival with the smallest
    ``|f_k| / (||w_k||_q + 1e-8)`` (``q`` = 2 for L2, 1 for Linf)::

        r = (|f_k| / (||w_k||_q + 1e-8) + 1e-4) * w_k / (||w_k||_2 + 1e-8)     (Linf: sign(w_k))
        total <- total + r
        x_adv <- clip01(x + (1 + overshoot) total)

    An example stops at its first misclassified iterate, which is its result. There are no random
    numbers, hence no restarts.

    Args:
        epsilon, norm: see :class:`MinimumNormAttack`.
        steps: iterations at most. Each costs one input gradient per rival and one more forward
            pass.
        overshoot: how far beyond the boundary, as a share of the way; >= 0.
        candidates: rivals, the wrong classes with so many of the largest logits at ``x``;
            ``None``: all wrong classes, as in the paper.
    """

    name = "deepfool"

    def __init__(self, epsilon=None, norm="l2", steps=50, overshoot=0.02, candidates=10):
        super().__init__(epsilon, norm, steps)
        self.overshoot = non_negative("overshoot", overshoot)
        self.candidates = None if candidates is None else whole("candidates", candidates, 1)

    def begin(self, objective, x, drawn):
        rivals, distance = survey(objective, x)
        return State(x, ops.zeros_like(x), x, distance, rivals[:, : self.candidates])

    def step(self, objective, x, state):
        s = state
        f, w, size = nearest_boundary(objective, s.image, s.rivals, self.norm, _TINY)
        length = per_example(ops.abs(f) / (size + _TINY) + _BEYOND, w)
        unit = ops.sign(w) if self.norm == "linf" else w / (per_example(size, w) + _TINY)
        total = s.total + length * unit
        image = ops.clip(x + (1 + self.overshoot) * total, 0.0, 1.0)
        wrong = ~losses.correct(objective.y, objective.logits(image))
        done = self.finished(s)
        best, distance = nearer(image, wrong & ~done, x, s.best, s.distance, self.norm)
        return State(
            image=ops.where(per_example(done, image), s.image, image),
            total=total,
            best=best,
            distance=distance,
            rivals=s.rivals,
        )

    def finished(self, state):
        return ops.isfinite(state.distance)

    def result(self, state):
        return state.best
