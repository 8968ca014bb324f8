"""HopSkipJump (Chen, Jordan and Wainwright, IEEE S&P 2020)."""

import numpy as np

from keras_emr.attacks.decision import DecisionAttack, flat, lengths, positive
from keras_emr.part import register, whole

_FIRST_RADIUS = 0.1
_MOST_SHORTENINGS = 24


@register
class HopSkipJump(DecisionAttack):
    """HopSkipJump: sign queries around a boundary point give a direction, a search the step.

    With ``d`` numbers in an image and ``theta = gamma / d^1.5`` (L2) or ``gamma / d^2`` (Linf),
    step ``t = 0, 1, ...`` from the boundary point ``x_t``, reached by bisection from ``p_t``::

        B     = min(initial_evaluations sqrt(t + 1), max_evaluations)
        delta = sqrt(d) theta ||p_t - x||_2   or   d theta ||p_t - x||_inf      (0.1 at t = 0)
        v     = mean_b (s_b - mean s) u_b,    s_b = +-1: x_t + delta u_b misclassified or not
        p_{t+1} = x_t + r v / ||v||_2   or   x_t + r sign(v)

    ``u_b`` are unit vectors, normal (L2) or uniform in the cube (Linf) before they are scaled,
    and as the model sees them: after clipping to [0, 1] and rounding. ``s_b`` is used as it is
    where all agree. ``r = ||x_t - x|| / sqrt(t + 1)`` is halved until ``p_{t+1}`` is misclassified.
    Bisection ends at ``theta ||p - x||``: on the segment to ``x`` (L2), or on the radius of the
    cube around ``x`` that ``p`` is clipped into (Linf).

    Cost: ``sum_t B`` queries (about ``67 steps^1.5`` by default: 34000 for 64 steps), in each step
    ``log2(1 / theta)`` for the bisection (at most 24) and some for ``r`` (at most 25).

    Ours: the nearest image of all steps is returned, and not the last; an example whose ``r`` was
    halved 24 times in vain stays where it is for this step.

    Args:
        epsilon, norm, restarts, tries: see :class:`DecisionAttack`; ``l2`` or ``linf``.
        steps: iterations, >= 1.
        initial_evaluations: probes of the first step, >= 1.
        max_evaluations: most probes of a step, >= 1.
        gamma: scales the tolerance of the bisection and the radius of the probes, > 0.
    """

    name = "hopskipjump"

    def __init__(
        self,
        epsilon=None,
        norm="l2",
        steps=64,
        restarts=1,
        initial_evaluations=100,
        max_evaluations=10000,
        gamma=1.0,
        tries=1000,
    ):
        super().__init__(epsilon, norm, steps, restarts, tries)
        self.initial_evaluations = whole("initial_evaluations", initial_evaluations, 1)
        self.max_evaluations = whole("max_evaluations", max_evaluations, 1)
        self.gamma = positive("gamma", gamma)

    @property
    def queries_per_step(self):
        mean = 2 / 3 * self.initial_evaluations * self.steps**0.5
        return min(mean, self.max_evaluations) + 30

    def walk(self, run, progress):
        d = run.size
        tolerance = self.gamma / (d**2 if self.norm == "linf" else d**1.5)
        here, before = run.best.copy(), run.distance.copy()
        active = run.active()
        here[active] = run.bisect(here[active], active, tolerance)
        for t in range(self.steps):
            active = run.active()
            if not len(active):
                return
            ratio = (d if self.norm == "linf" else d**0.5) * tolerance
            radius = ratio * before[active] if t else np.full(len(active), _FIRST_RADIUS)
            number = int(min(self.initial_evaluations * (t + 1) ** 0.5, self.max_evaluations))
            direction = self._direction(run, here[active], active, radius, number)
            length = run.distances(here[active], active) / (t + 1) ** 0.5
            moved, ok = self._jump(run, here[active], active, direction, length)
            jumped = active[ok]
            before[jumped] = run.distances(moved[ok], jumped)
            here[jumped] = run.bisect(moved[ok], jumped, tolerance)
            progress(t + 1)

    def _direction(self, run, here, active, radius, number):
        """(M, d): the step's direction, of length 1 (L2) or of signs (Linf)."""

        def probes(row, m):
            stream = run.streams[active[row]]
            if self.norm == "linf":
                u = 2 * stream.random((m, run.size), dtype="float32") - 1
            else:
                u = stream.standard_normal((m, run.size), dtype="float32")
            u *= (radius[row] / lengths(u, "l2")).astype("float32")[:, None]
            base = here[row].reshape(1, -1)
            images = run.image(base + u)
            return images, (images.reshape(m, -1) - base) / np.float32(radius[row])

        weighted, signs, plain = run.sign_means(active, number, probes)
        # Where all agree the baseline would leave nothing.
        baseline = np.where(np.abs(signs) == 1, 0.0, signs)
        v = weighted - baseline[:, None] * plain
        if self.norm == "linf":
            return np.sign(v)
        return v / np.maximum(lengths(v, "l2"), 1e-30)[:, None]

    def _jump(self, run, here, active, direction, length):
        """The longest of the steps that ends misclassified: images, and whether there is one."""
        moved, ok = here.copy(), np.zeros(len(active), bool)
        for halvings in range(_MOST_SHORTENINGS + 1):
            rows = np.flatnonzero(~ok)
            if not len(rows):
                break
            r = (length[rows] / 2**halvings)[:, None]
            tried = run.image(flat(here[rows]) + r * direction[rows])
            hit = run.ask(tried, active[rows])
            moved[rows[hit]], ok[rows[hit]] = tried[hit], True
        return moved, ok
