"""What NES and SPSA have in common: ascent along a gradient estimated from scores."""

import numpy as np

from keras_emr.attacks.ball import project
from keras_emr.attacks.query import QueryAttack, margins, wrong
from keras_emr.errors import UserError
from keras_emr.part import non_negative, whole

# Probe images are made and asked for in parts of at most about this size.
_PROBE_BYTES = 64 * 2**20


def positive(field, value):
    """``value`` as a float. Raises :class:`UserError` unless it is a finite number > 0."""
    if non_negative(field, value) == 0:
        raise UserError(f"{field} must not be zero. Received: {value!r}. Expected a number > 0.")
    return float(value)


class EstimatedGradientAttack(QueryAttack):
    """Projected ascent on ``f = max_{k != y} z_k - z_y`` along an estimate of its gradient.

    With n random directions ``u_j``, ``s`` the probe distance::

        g = (1/n) sum_j [f(x + s u_j) - f(x - s u_j)] / (2 s) * u_j

    whose expectation is the gradient of f (smoothed over the probes) where directions have
    uncorrelated entries of variance one. Probes are not clipped: they may leave the ball, and
    [0, 1] by about ``s``. An example is finished as soon as an iterate is misclassified.

    Subclasses give ``probe_distance``, ``directions``, ``begin`` and ``move``.

    Args:
        epsilon, norm, steps, restarts: see :class:`QueryAttack`. Each step of an unfinished
            example costs ``2 samples + 1`` queries.
        samples: directions n per step, >= 1.
    """

    def __init__(self, epsilon, norm, steps, samples, restarts):
        super().__init__(epsilon, norm, steps, restarts)
        self.samples = whole("samples", samples, 1)

    @property
    def probe_distance(self):
        raise NotImplementedError

    def directions(self, stream, out):
        """Fill ``out``, (n, H, W, C) float32, from the stream of an example."""
        raise NotImplementedError

    def begin(self, x):
        """What a run keeps between steps, arrays over all examples."""
        return ()

    def move(self, image, gradient, memory, active, step):
        """Where step ``step`` (from 0) takes ``image``, before projection; float64.

        Args:
            image, gradient: (M, H, W, C), of the examples ``active``.
            memory: as ``begin`` made it; to be updated.
            active: (M,) indices.
            step: int.
        """
        raise NotImplementedError

    @property
    def queries_per_step(self):
        return 2.0 * self.samples + 1

    def search(self, query, x, y, streams, progress=None):
        y, image, result = np.asarray(y), x.copy(), x.copy()
        memory = self.begin(x)
        queries = np.zeros(len(x), "int64")
        active = np.arange(len(x))
        for step in range(self.steps):
            if not len(active):
                break
            own = [streams[i] for i in active]
            gradient = self.gradient(query, image[active], y[active], own)
            moved = self.move(image[active], gradient, memory, active, step)
            image[active] = project(moved, x[active], self.epsilon, self.norm)
            broken = wrong(y[active], query(image[active]))
            queries[active] += 2 * self.samples + 1
            result[active[broken]] = image[active[broken]]
            active = active[~broken]
            if progress is not None:
                progress(step + 1)
        return result, queries

    def gradient(self, query, image, y, streams):
        """Estimated gradient of f, (N, H, W, C) float64, at ``image``; 2 n queries each."""
        pair = 2 * 4 * image[0].size
        # Set by the size of an image alone: the parts of a sum do not depend on the batch.
        samples = min(self.samples, max(1, _PROBE_BYTES // pair))
        examples = max(1, _PROBE_BYTES // (pair * samples))
        total = np.zeros(image.shape)
        for first in range(0, len(image), examples):
            part = slice(first, first + examples)
            for done in range(0, self.samples, samples):
                count = min(samples, self.samples - done)
                total[part] += self._sum(query, image[part], y[part], streams[part], count)
        return total / (2 * self.probe_distance * self.samples)

    def _sum(self, query, image, y, streams, count):
        """Sum over ``count`` directions of ``[f(x + s u) - f(x - s u)] u``."""
        directions = np.empty((len(image), count, *image.shape[1:]), "float32")
        for stream, out in zip(streams, directions, strict=True):
            self.directions(stream, out)
        probes = np.empty((len(image), 2, *directions.shape[1:]), "float32")
        np.multiply(directions, np.float32(self.probe_distance), out=probes[:, 0])
        np.subtract(image[:, None], probes[:, 0], out=probes[:, 1])
        probes[:, 0] += image[:, None]
        scores = query(probes.reshape(-1, *image.shape[1:]))
        f = -margins(np.repeat(y, 2 * count), scores).reshape(len(image), 2, count)
        slopes = (f[:, 0] - f[:, 1]).astype("float32")
        rows = directions.reshape(len(image), count, -1)
        return (slopes[:, None] @ rows).reshape(image.shape)
