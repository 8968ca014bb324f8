"""Square Attack (Andriushchenko, Croce, Flammarion and Hein, ECCV 2020)."""

import bisect
import math

import numpy as np

from keras_emr.attacks.query import QueryAttack, margins, wrong
from keras_emr.attacks.square_windows import Pyramids, Stripes
from keras_emr.errors import UserError
from keras_emr.part import non_negative, one_of, register

# The share of the image that a window covers is halved after each of these iterations ...
_HALVED_AFTER = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)
# ... of a run of this many.
_PLANNED = 10000


def window_share(iteration, p_init):
    """Share of the image that the window of an iteration (from 0) covers."""
    return p_init / 2 ** bisect.bisect_left(_HALVED_AFTER, iteration)


def window_side(share, height, width, norm):
    """Side in pixels of a window over this share of the image."""
    side = max(round(math.sqrt(share * height * width)), 1 if norm == "linf" else 3)
    if norm == "l2":
        side += 1 - side % 2
    return min(side, height, width)


@register
class Square(QueryAttack):
    """Random search over square windows (score-based, no gradients).

    A candidate differs from the best image so far in a square window of side ``sqrt(p H W)``. It
    is accepted if the margin ``m = z_y - max_{k != y} z_k`` is strictly lower; an example is
    finished at ``m <= 0``. Each example draws windows and signs of its own, where the
    authors' PyTorch code shares them within a batch.

    Linf: starts from vertical stripes, ``x + epsilon s`` with a random sign ``s`` per column and
    channel; a candidate sets the window to ``x + epsilon s``, one sign per channel; all clipped
    to [0, 1].

    L2: starts from a tiling of patterns ``eta`` (a pyramid and its negative, side by side or one
    above the other) with random signs, scaled to length epsilon. A candidate, from the
    perturbation d and two windows of the same side: adds ``+-eta`` to d scaled to length 1 in the
    first; scales that, per channel, to length ``sqrt((epsilon^2 - ||d||^2) / C + ||d||_W^2)``,
    ``||d||_W`` being the channel's length in both windows; clears the rest of the second; scales
    the whole to length epsilon; clips to [0, 1].

    As in the authors' code, the last row and column that a window could start from are never
    drawn, so that Linf leaves the last row and column of the image at the start's stripes while
    windows are smaller than the image.

    A tie (m = 0) finishes an example, but is a success only if arg-max picks another class.

    Args:
        epsilon, norm, restarts: see :class:`QueryAttack`.
        steps: iterations, >= 1; 5000 is AutoAttack's. An example costs ``1 + steps`` queries
            unless it is broken before.
        p_init: share p of the image that the first windows cover, in (0, 1]. It is halved after
            iterations 10, 50, 200, 500, 1000, 2000, 4000, 6000 and 8000.
        rescale: go through this schedule as if iteration i were ``int(10000 i / steps)``, as the
            authors' stand-alone attack does; ``False``: as AutoAttack does.
    """

    name = "square"

    def __init__(self, epsilon, norm="linf", steps=5000, p_init=0.8, rescale=False, restarts=1):
        super().__init__(epsilon, norm, steps, restarts)
        self.p_init = non_negative("p_init", p_init)
        if not 0 < self.p_init <= 1:
            raise UserError(f"p_init is out of range. Received: {p_init!r}. Expected 0 < p <= 1.")
        self.rescale = one_of("rescale", rescale, (False, True))

    def side(self, iteration, height, width):
        """Side of the window of an iteration (from 0)."""
        if self.rescale:
            iteration = int(iteration / self.steps * _PLANNED)
        return window_side(window_share(iteration, self.p_init), height, width, self.norm)

    def search(self, query, x, y, streams, progress=None):
        y = np.asarray(y)
        candidates = (Stripes if self.norm == "linf" else Pyramids)(x, self.epsilon, streams)
        image = candidates.first()
        scores = query(image)
        margin, fooled = margins(y, scores), wrong(y, scores)
        queries = np.ones(len(x), "int64")
        active = np.flatnonzero(margin > 0)
        for iteration in range(self.steps):
            if not len(active):
                break
            tried = candidates.next(image, active, self.side(iteration, *x.shape[1:3]))
            scores = query(tried)
            queries[active] += 1
            found = margins(y[active], scores)
            better = found < margin[active]
            rows = active[better]
            image[rows], margin[rows] = tried[better], found[better]
            fooled[rows] = wrong(y[rows], scores[better])
            active = active[found > 0]
            if progress is not None:
                progress(iteration + 1)
        return np.where(fooled[:, None, None, None], image, x), queries
