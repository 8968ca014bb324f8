"""What attacks share that see labels alone: counting, the start, bisection, sign estimates."""

from __future__ import annotations

import numpy as np

from keras_emr.attacks.query import QueryAttack, wrong
from keras_emr.errors import UserError
from keras_emr.part import whole

# Most bytes of float32 images made for one call of the query.
PROBE_BYTES = 64 * 2**20
# Halvings after which neighbouring images of a segment are equal in float32.
_MOST_HALVINGS = 24
_MOST_TRIES_AT_ONCE = 64
_BLENDS = np.repeat([1.0, 0.75, 0.5, 0.25], 2).astype("float32")
_PUSHES = (0.0, 1e-4, 1e-3, 1e-2)


def positive(field, value):
    """``value`` as a float. Raises :class:`UserError` unless it is a finite number > 0."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not 0 < value < float("inf"):
        raise UserError(f"{field} must be a number > 0. Received: {value!r}.")
    return float(value)


def flat(images):
    """(N, ...) -> (N, d), float64."""
    return images.reshape(len(images), int(np.prod(images.shape[1:]))).astype("float64")


def lengths(delta, norm):
    """Norms of the rows: (N, d) -> (N,)."""
    return np.abs(delta).max(axis=1) if norm == "linf" else np.sqrt(np.square(delta).sum(axis=1))


class Run:
    """The state of a search: N examples, the nearest misclassified image of each, queries.

    Args:
        query, x, y, streams: see :meth:`QueryAttack.search`.
        norm: ``linf`` or ``l2``.
        epsilon: an example is finished at this distance; ``None``: at 0.

    Attributes:
        best: (N, H, W, C) float32, the nearest misclassified image asked for, or the clean one.
        distance: (N,) float64, its distance; ``inf`` without one.
        count: (N,) int, images asked for.
        size: numbers in an image; ``limit``: images in a call of the query.
    """

    def __init__(self, query, x, y, streams, norm, epsilon):
        self.x = np.ascontiguousarray(x, dtype="float32")
        self.query, self.y, self.streams, self.norm = query, np.asarray(y), streams, norm
        self.goal = 0.0 if epsilon is None else epsilon
        self.shape = self.x.shape[1:]
        self.size = int(np.prod(self.shape))
        self.limit = max(1, PROBE_BYTES // (4 * self.size))
        self.best = self.x.copy()
        self.distance = np.full(len(self.x), np.inf)
        self.count = np.zeros(len(self.x), "int64")

    def active(self):
        """Indices of the examples that have a misclassified image, but none near enough."""
        return np.flatnonzero(np.isfinite(self.distance) & (self.distance > self.goal))

    def image(self, rows):
        """Rows (M, d) of any float type as what the model can be shown: float32, in [0, 1]."""
        return np.clip(rows, 0.0, 1.0).astype("float32").reshape(len(rows), *self.shape)

    def ask(self, images, which):
        """Whether the model is wrong: images (M, H, W, C) of the examples ``which`` (M,)."""
        self.count += np.bincount(which, minlength=len(self.count))
        cuts = range(0, len(images), self.limit)
        parts = [(images[i : i + self.limit], which[i : i + self.limit]) for i in cuts]
        answers = [wrong(self.y[rows], np.asarray(self.query(part))) for part, rows in parts]
        return np.concatenate(answers) if answers else np.zeros(0, bool)

    def distances(self, images, which):
        """Of images (M, H, W, C) from the clean images of ``which``: (M,)."""
        return lengths(flat(images) - flat(self.x[which]), self.norm)

    def keep(self, images, which, misclassified=True):
        """Note the misclassified images that are nearer than the best: (M,) bool, which are."""
        reached = self.distances(images, which)
        nearer = misclassified & (reached < self.distance[which])
        self.best[which[nearer]] = images[nearer]
        self.distance[which[nearer]] = reached[nearer]
        return nearer

    def start(self, tries):
        """Look for a first misclassified image, farthest from the clean one first.

        Uniform noise and black-and-white noise of random density in turn, as it is, then blended
        into the clean image at 75, 50 and 25 %, and so on; the first that is misclassified is
        kept. Blends, and noise that may be nearly black or white, serve where a model sees one
        class in all uniform noise. Asked for in rounds of 1, 2, 4, ... at most 64 images.
        """
        pending, done, number = np.arange(len(self.x)), 0, 1
        while len(pending) and done < tries:
            number = min(number, tries - done, _MOST_TRIES_AT_ONCE, self.limit)
            group = self.limit // number
            for first in range(0, len(pending), group):
                self._try(pending[first : first + group], done, number)
            pending = pending[np.isinf(self.distance[pending])]
            done, number = done + number, 2 * number

    def _try(self, rows, done, number):
        images = np.empty((len(rows), number, *self.shape), "float32")
        tries = np.arange(done, done + number)
        weight = _BLENDS[tries % len(_BLENDS)][:, None, None, None]
        for noise, i in zip(images, rows, strict=True):
            self.streams[i].random(out=noise, dtype="float32")
            density = self.streams[i].random(number)
            for j in np.flatnonzero(tries % 2):
                noise[j] = noise[j] < density[j]
            noise *= weight
            noise += (1 - weight) * self.x[i]
        np.clip(images, 0.0, 1.0, out=images)
        asked = self.ask(images.reshape(-1, *self.shape), np.repeat(rows, number))
        asked = asked.reshape(len(rows), number)
        hit = np.flatnonzero(asked.any(axis=1))
        self.keep(images[hit, asked[hit].argmax(axis=1)], rows[hit])

    def bisect(self, images, which, tolerance):
        """Move misclassified images towards the clean ones, up to the boundary, and keep them.

        L2: along the segment between them. Linf: clipped into the ball around the clean image
        whose radius is bisected, as in HopSkipJump.

        Args:
            images: (M, H, W, C), misclassified.
            which: (M,) their examples, each once.
            tolerance: of the result, as a share of the distance at the start; a number or (M,).

        Returns:
            (M, H, W, C) float32: misclassified, with a correctly classified image (or the clean
            one) nearer by at most that. ``ceil(log2(1 / tolerance))`` queries each, at most 24.
        """
        tolerance = np.broadcast_to(np.asarray(tolerance, "float64"), len(which))
        halvings = np.clip(np.ceil(np.log2(1 / tolerance)), 1, _MOST_HALVINGS).astype(int)
        images = images.copy()
        clean, delta = flat(self.x[which]), flat(images) - flat(self.x[which])
        radius = lengths(delta, self.norm)
        low, high = np.zeros(len(which)), np.ones(len(which))
        for done in range(halvings.max(initial=0)):
            rows = np.flatnonzero(halvings > done)
            middle = ((low + high) / 2)[rows][:, None]
            if self.norm == "linf":
                bound = middle * radius[rows][:, None]
                moved = self.image(clean[rows] + np.clip(delta[rows], -bound, bound))
            else:
                moved = self.image(clean[rows] + middle * delta[rows])
            hit = self.ask(moved, which[rows])
            images[rows[hit]] = moved[hit]
            high[rows[hit]], low[rows[~hit]] = middle[hit, 0], middle[~hit, 0]
        self.keep(images, which)
        return images

    def sign_means(self, which, number, make):
        """Means over probes, with ``s = +1`` where the probe is misclassified and else ``-1``.

        Args:
            which: (M,) examples.
            number: probes of each.
            make: ``(row, m) -> (images (m, H, W, C), vectors (m, d))``, the next m probes of
                example ``which[row]``, float32.

        Returns:
            Means of ``s v`` (M, d), of ``s`` (M,) and of ``v`` (M, d).
        """
        weighted, plain = np.zeros((2, len(which), self.size))
        signs = np.zeros(len(which))
        # Cut by the image's size alone: sums must not depend on how many examples there are.
        chunk = min(number, self.limit)
        group = self.limit // chunk
        for first in range(0, len(which), group):
            rows = range(first, min(first + group, len(which)))
            for done in range(0, number, chunk):
                m = min(chunk, number - done)
                images = np.empty((len(rows), m, *self.shape), "float32")
                vectors = []
                for i, row in enumerate(rows):
                    images[i], v = make(row, m)
                    vectors.append(v)
                asked = self.ask(images.reshape(-1, *self.shape), np.repeat(which[rows], m))
                s = np.where(asked, 1.0, -1.0).astype("float32").reshape(len(rows), m)
                for i, row in enumerate(rows):
                    weighted[row] += s[i] @ vectors[i]
                    plain[row] += vectors[i].sum(axis=0)
                    signs[row] += s[i].sum()
        return weighted / number, signs / number, plain / number

    def result(self):
        """The best images, asked for once more; clean ones where the model is right after all.

        So near the boundary a model's rounding can depend on what else is in its batch. An image
        that is no longer misclassified is moved away from the clean one by 0.01, 0.1, 1 % first.
        """
        found, pending = self.x.copy(), np.flatnonzero(np.isfinite(self.distance))
        for push in _PUSHES:
            images = self.best[pending]
            if push:
                clean = flat(self.x[pending])
                images = self.image(clean + (1 + push) * (flat(images) - clean))
            hit = self.ask(images, pending)
            found[pending[hit]] = images[hit]
            pending = pending[~hit]
        return found


class DecisionAttack(QueryAttack):
    """A search for the nearest misclassified image that sees only the predicted class.

    It starts at the first misclassified image among noise and blends of noise with the clean
    image (:meth:`Run.start`); an example without one stays clean. The image returned is asked for
    once more at the end (:meth:`Run.result`). Subclasses give ``walk(run, progress)``.

    Args:
        epsilon: an example is finished, which saves queries, as soon as an image within
            ``epsilon`` is found; ``None``: never, the nearest image is looked for.
        norm: the distance that is made small.
        steps, restarts: see :class:`QueryAttack`.
        tries: most images asked for by the start, >= 1.
    """

    name = "decision"
    needs = "labels"
    bounded = False

    def __init__(self, epsilon=None, norm="l2", steps=1000, restarts=1, tries=1000):
        super().__init__(epsilon, norm, steps, restarts)
        self.tries = whole("tries", tries, 1)

    def search(self, query, x, y, streams, progress=None):
        run = Run(query, x, y, streams, self.norm, self.epsilon)
        run.start(self.tries)
        self.walk(run, progress or (lambda done: None))
        return run.result(), run.count

    def walk(self, run, progress):
        """Bring ``run.best`` nearer, from its start."""
        raise NotImplementedError
