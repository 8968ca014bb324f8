"""Models in NumPy, and what attacks asked them."""

import numpy as np


def streams(n, seed=0):
    """Streams of the examples 0 .. n-1, made anew."""
    return [np.random.default_rng([seed, 0, i]) for i in range(n)]


class Linear:
    """Logits ``x W + b``; the labels are the predictions at ``x``.

    Args:
        shape: (N, H, W, C).
        classes: int.
        edge: ``False``: the last row and column of pixels have no weight.
        low, high: range of the pixels.
        lead: added to the logit of class 0.
    """

    def __init__(self, shape, classes=3, edge=True, low=0.0, high=1.0, lead=0.0, seed=0):
        rng = np.random.default_rng(seed)
        self.x = rng.uniform(low, high, shape).astype("float32")
        w = rng.normal(size=(*shape[1:], classes))
        if not edge:
            w[-1], w[:, -1] = 0, 0
        self.w, self.b = w.reshape(-1, classes), rng.normal(size=classes) * 0.1
        self.b[0] += lead
        self.y = self(self.x).argmax(-1)

    def __call__(self, images):
        return self.each(images, lambda row: row @ self.w + self.b)

    @staticmethod
    def each(images, scores):
        """One by one: a product of matrices rounds a row by the size of the batch."""
        rows = images.reshape(len(images), -1).astype("float64")
        return np.array([scores(row) for row in rows])


class Wavy(Linear):
    """Logits ``sin(x A) B``."""

    def __call__(self, images):
        rng = np.random.default_rng(7)
        a, b = rng.normal(size=(len(self.w), 16)), rng.normal(size=(16, self.w.shape[1]))
        return self.each(images, lambda row: np.sin(row @ a) @ b)


class Asked:
    """A query function that keeps what it was asked."""

    def __init__(self, model):
        self.model, self.batches = model, []

    def __call__(self, images):
        assert images.dtype == np.float32 and images.shape[1:] == self.model.x.shape[1:]
        self.batches.append(images.copy())
        return self.model(images)

    def per_example(self):
        """Images asked for each example: those nearer to its clean image than to any other."""
        images = np.concatenate(self.batches).reshape(-1, self.model.x[0].size)
        clean = self.model.x.reshape(1, len(self.model.x), -1)
        nearest = ((images[:, None] - clean) ** 2).sum(-1).argmin(1)
        return np.bincount(nearest, minlength=len(self.model.x))


def margin(y, z):
    """``z_y - max_{k != y} z_k`` of one example."""
    return z[y] - max(v for k, v in enumerate(z) if k != y)


def sizes(x_adv, x, norm):
    delta = (x_adv.astype("float64") - x.astype("float64")).reshape(len(x), -1)
    return np.abs(delta).max(1) if norm == "linf" else np.linalg.norm(delta, axis=1)


def assert_feasible(x_adv, x, epsilon, norm):
    assert x_adv.dtype == np.float32 and x_adv.shape == x.shape
    assert sizes(x_adv, x, norm).max() <= epsilon + 1e-6
    assert x_adv.min() >= 0 and x_adv.max() <= 1


def assert_alone_as_together(attack, model):
    """The same bits for each example by itself, for the last half, and for all; returns these."""
    x, y, n = model.x, model.y, len(model.x)
    together, queries = attack.search(model, x, y, streams(n))
    for rows in [*np.arange(n)[:, None], np.arange(n // 2, n)]:
        own = [streams(n)[i] for i in rows]
        found, asked = attack.search(model, x[rows], y[rows], own)
        np.testing.assert_array_equal(found, together[rows])
        np.testing.assert_array_equal(asked, queries[rows])
    return together, queries
