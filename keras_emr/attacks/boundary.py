"""The boundary attack (Brendel, Rauber and Bethge, ICLR 2018)."""

import numpy as np

from keras_emr.attacks.decision import DecisionAttack, flat, lengths, positive
from keras_emr.part import register

_START_TOLERANCE = 1e-3
_PROBE_EVERY = 10
_FACTOR = 1.5
_SMALLEST_SOURCE_STEP = 1e-7


class Window:
    """The last ``width`` answers of each of ``n`` examples."""

    def __init__(self, n, width):
        self.answers, self.used = np.zeros((n, width), bool), np.zeros(n, int)

    def add(self, which, answers):
        self.answers[which, self.used[which] % self.answers.shape[1]] = answers
        self.used[which] += 1

    def factors(self, which, low, high):
        """1.5 where the share of yes is above ``high``, 1/1.5 below ``low``; else, or too few, 1.

        Answers to the old step say nothing about the new one: a window that led to a change is
        begun anew.
        """
        share = self.answers[which].mean(axis=1)
        full = self.used[which] >= self.answers.shape[1]
        factors = np.where(share > high, _FACTOR, np.where(share < low, 1 / _FACTOR, 1.0))
        factors = np.where(full, factors, 1.0)
        self.used[which[factors != 1]] = 0
        return factors


@register
class BoundaryAttack(DecisionAttack):
    """The boundary attack: a random walk along the boundary, in L2.

    From the misclassified image ``x'`` at distance ``D`` from ``x``, with ``e`` normal noise made
    orthogonal to ``x - x'`` and scaled to length ``spherical_step D``::

        side = x + (x' + e - x) / sqrt(1 + spherical_step^2)          (as far from x as x')
        next = side + max(source_step D + |x - side| - D, 0) (x - side) / |x - side|

    both clipped to [0, 1]. ``x'`` becomes ``next`` if that is misclassified and nearer. Both step
    sizes are an example's own: every 10th step ``side`` is asked for as well, and after such a
    probe both are multiplied by 1.5 if more than 50 % of the last 100 ``side`` were misclassified,
    divided by 1.5 if fewer than 20 %; ``source_step`` is multiplied by 1.5 if more than 25 % of
    the last 30 probed ``next`` were misclassified, divided by 1.5 below 10 %. An example ends when
    its ``source_step`` falls below 1e-7.

    The rules and numbers are those of Foolbox's implementation, from a description of it; the
    probe every 10th step, the emptying of a window that led to a change and the end at 1e-7 from
    memory. The start is bisected to 0.1 % of its distance first.

    Cost: 1.1 queries per step and example.

    Args:
        epsilon, norm, restarts, tries: see :class:`DecisionAttack`; ``l2`` only.
        steps: iterations, >= 1.
        spherical_step: first length of the orthogonal step, as a share of ``D``, > 0.
        source_step: first length of the step to ``x``, as a share of ``D``, > 0.
    """

    name = "boundary"
    norms = ("l2",)

    def __init__(
        self,
        epsilon=None,
        norm="l2",
        steps=25000,
        restarts=1,
        spherical_step=0.01,
        source_step=0.01,
        tries=1000,
    ):
        super().__init__(epsilon, norm, steps, restarts, tries)
        self.spherical_step = positive("spherical_step", spherical_step)
        self.source_step = positive("source_step", source_step)

    def walk(self, run, progress):
        n = len(run.x)
        active = run.active()
        run.bisect(run.best[active], active, _START_TOLERANCE)
        sphere, source = np.full(n, self.spherical_step), np.full(n, self.source_step)
        sides, nexts = Window(n, 100), Window(n, 30)
        for t in range(self.steps):
            active = run.active()
            active = active[source[active] >= _SMALLEST_SOURCE_STEP]
            if not len(active):
                return
            side, image = self._propose(run, active, sphere[active], source[active])
            hit = run.ask(image, active)
            if t % _PROBE_EVERY == 0:
                sides.add(active, run.ask(side, active))
                nexts.add(active, hit)
                factors = sides.factors(active, 0.2, 0.5)
                sphere[active] *= factors
                source[active] *= factors * nexts.factors(active, 0.1, 0.25)
            run.keep(image, active, hit)
            progress(t + 1)

    @staticmethod
    def _propose(run, active, sphere, source):
        """``side`` and ``next`` of the active examples."""
        clean, length = flat(run.x[active]), run.distance[active][:, None]
        outward = flat(run.best[active]) - clean
        e = np.stack([run.streams[i].standard_normal(run.size) for i in active])
        e -= (e * outward).sum(axis=1, keepdims=True) / length**2 * outward
        e *= sphere[:, None] * length / np.maximum(lengths(e, "l2"), 1e-30)[:, None]
        side = run.image(clean + (outward + e) / np.sqrt(1 + sphere[:, None] ** 2))
        inward = clean - flat(side)
        far = lengths(inward, "l2")[:, None]
        advance = np.maximum(source[:, None] * length + far - length, 0.0)
        return side, run.image(flat(side) + advance / np.maximum(far, 1e-30) * inward)
