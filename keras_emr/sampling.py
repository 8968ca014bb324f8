"""Where an attack's random numbers come from: a seed stream in training, the host in evaluation."""

import keras
import numpy as np
from keras import ops

from keras_emr.backend import replicas

# Validation repeats the same noise every epoch, so that epochs can be compared.
VALIDATION_SEED = 2**20


class StreamSampler:
    """Draws inside the compiled step from a ``SeedGenerator``.

    From an int instead, the same sequence of draws each time the sampler is made: every draw has
    a seed of its own, so that restarts differ.

    On several devices each draws for the rows of the global batch, and takes its own: an example's
    numbers do not depend on the number of devices.
    """

    def __init__(self, seed):
        self._seed = seed

    @property
    def seed(self):
        """The seed of the next draw."""
        if not isinstance(self._seed, int):
            return self._seed
        self._seed += 1
        return self._seed - 1

    def uniform(self, shape, low=-1.0, high=1.0):
        dtype, seed = keras.config.floatx(), self.seed
        return _own(shape, lambda s: keras.random.uniform(s, low, high, dtype=dtype, seed=seed))

    def normal(self, shape):
        dtype, seed = keras.config.floatx(), self.seed
        return _own(shape, lambda s: keras.random.normal(s, dtype=dtype, seed=seed))

    def categorical(self, logits):
        seed, share = self.seed, replicas.share_of_rows(ops.shape(logits)[0])
        drawn = keras.random.categorical(replicas.gather(logits), 1, seed=seed)[:, 0]
        return drawn if share is None else _rows(drawn, share, ops.shape(logits)[0])


def _own(shape, draw):
    """The rows of ``draw(shape of the global batch)`` that are this replica's."""
    share = replicas.share_of_rows(shape[0])
    if share is None:
        return draw(shape)
    return _rows(draw((share[1], *shape[1:])), share, shape[0])


def _rows(drawn, share, count):
    return drawn[share[0] : share[0] + count]


def example_streams(seed, restart, indices):
    """A ``numpy.random.Generator`` for each of the examples with these indices."""
    return [np.random.default_rng([seed, restart, int(i)]) for i in indices]


class ExampleSampler:
    """Draws on the host, each example from a stream of its own.

    The numbers of an example depend on (seed, restart, its index in the data set) alone: not on
    the batch size, nor on which other examples are attacked, nor on the backend.

    Args:
        seed: int.
        restart: int.
        indices: (N,) indices of the examples in the data set.
    """

    def __init__(self, seed, restart, indices):
        self.restart = restart
        self.streams = example_streams(seed, restart, indices)

    def _draw(self, one, shape):
        rows = [one(stream, tuple(shape[1:])) for stream in self.streams]
        return ops.convert_to_tensor(np.stack(rows).astype(keras.config.floatx()))

    def uniform(self, shape, low=-1.0, high=1.0):
        return self._draw(lambda stream, size: stream.uniform(low, high, size), shape)

    def normal(self, shape):
        return self._draw(lambda stream, size: stream.normal(size=size), shape)
