"""Sign-OPT (Cheng, Singh, Chen, Chen, Liu and Hsieh, ICLR 2020)."""

import numpy as np

from keras_emr.attacks.decision import DecisionAttack, flat, lengths, positive
from keras_emr.part import register, whole

_TOLERANCE_RATIO = 500
_MOST_TRIES = 15
_GROW, _SHRINK = 2.0, 0.25
_SMALLEST_ALPHA, _ALPHA_AGAIN = 1e-4, 1.0
_BETA_SHRINK, _SMALLEST_BETA = 0.1, 1e-5


@register
class SignOPT(DecisionAttack):
    """Sign-OPT: descent on the distance to the boundary, as a function of the direction, in L2.

    ``g(theta)`` is the distance from ``x`` to the boundary along the unit vector ``theta``. A step
    estimates its gradient from signs, one query each, with unit vectors ``u_q`` (normal, scaled)::

        G = -mean_q s_q u_q,   s_q = +1 if x + g(theta) N(theta + beta u_q) is misclassified, or -1
        theta <- N(theta - alpha G),                                              N(v) = v / |v|

    all images clipped to [0, 1]. Line search, at most 15 tries each way: as long as ``g`` falls,
    ``alpha`` is doubled for another try; if the first fails, ``alpha`` is divided by 4 until it
    does. A direction is better if the image at the old distance is misclassified, which one query
    tells; only then ``g`` is bisected, to ``beta / 500`` of it. When ``alpha`` falls below 1e-4 it
    begins again at 1 and ``beta`` is divided by 10; below ``beta = 1e-5`` an example is finished.

    The method is the paper's. Every constant is recalled from the authors' code and could not be
    verified here. Ours: the query instead of a bisection of worse directions; clipping, after
    which ``theta`` is the direction of the clipped image; the end at 1e-5, beyond which probes are
    equal in float32; and the start, one misclassified image and not the best of 100 directions.

    Cost: ``directions`` queries per step and example, about 30 for the line search.

    Args:
        epsilon, norm, restarts, tries: see :class:`DecisionAttack`; ``l2`` only.
        steps: iterations, >= 1.
        directions: Q, probes of a gradient, >= 1.
        alpha: first step size, > 0.
        beta: first radius of the probes, as an angle, > 0.
    """

    name = "sign-opt"
    norms = ("l2",)

    def __init__(
        self,
        epsilon=None,
        norm="l2",
        steps=1000,
        restarts=1,
        directions=200,
        alpha=0.2,
        beta=0.001,
        tries=1000,
    ):
        super().__init__(epsilon, norm, steps, restarts, tries)
        self.directions = whole("directions", directions, 1)
        self.alpha = positive("alpha", alpha)
        self.beta = positive("beta", beta)

    @property
    def queries_per_step(self):
        return self.directions + 30.0

    def walk(self, run, progress):
        n = len(run.x)
        alpha, beta = np.full(n, self.alpha), np.full(n, self.beta)
        active = run.active()
        run.bisect(run.best[active], active, self.beta / _TOLERANCE_RATIO)
        # A smaller first beta is used until it fails.
        smallest = min(_SMALLEST_BETA, self.beta)
        for t in range(self.steps):
            active = run.active()
            active = active[beta[active] >= smallest]
            if not len(active):
                return
            theta = flat(run.best[active]) - flat(run.x[active])
            theta /= lengths(theta, "l2")[:, None]
            descent = self._descent(run, active, theta, beta)
            self._line_search(run, active, theta, descent, alpha, beta)
            again = active[alpha[active] < _SMALLEST_ALPHA]
            alpha[again] = _ALPHA_AGAIN
            beta[again] *= _BETA_SHRINK
            progress(t + 1)

    def _descent(self, run, active, theta, beta):
        """``-G``: (M, d)."""

        def probes(row, m):
            i = active[row]
            u = run.streams[i].standard_normal((m, run.size), dtype="float32")
            u /= lengths(u, "l2").astype("float32")[:, None]
            turned = theta[row] + beta[i] * u
            turned *= (run.distance[i] / lengths(turned, "l2"))[:, None]
            return run.image(flat(run.x[i : i + 1]) + turned), u

        return run.sign_means(active, self.directions, probes)[0]

    @staticmethod
    def _line_search(run, active, theta, descent, alpha, beta):
        """Turn ``theta`` while it gets nearer; sets ``run.best`` and ``alpha``."""

        def better(rows):
            """The rows whose direction at their ``alpha`` is better, after keeping it."""
            which = active[rows]
            turned = theta[rows] + alpha[which][:, None] * descent[rows]
            turned *= (run.distance[which] / lengths(turned, "l2"))[:, None]
            images = run.image(flat(run.x[which]) + turned)
            hit = run.ask(images, which)
            old = run.distance[which[hit]]
            run.bisect(images[hit], which[hit], beta[which[hit]] / _TOLERANCE_RATIO)
            return rows[hit][run.distance[which[hit]] < old]

        rows = np.arange(len(active))
        improved = np.zeros(len(active), bool)
        for _ in range(_MOST_TRIES):
            rows = better(rows)
            if not len(rows):
                break
            improved[rows] = True
            alpha[active[rows]] *= _GROW
        rows = np.flatnonzero(~improved)
        for _ in range(_MOST_TRIES):
            if not len(rows):
                break
            alpha[active[rows]] *= _SHRINK
            rows = np.setdiff1d(rows, better(rows))
