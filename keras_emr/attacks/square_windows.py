"""First images and candidates of the Square attack: random patterns in square windows."""

import functools

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from keras_emr.attacks.ball import bounds, l2_radius, lengths
from keras_emr.attacks.query import Draws

_TINY = 1e-12


def _pyramid(rows, columns):
    """Sum over r = 0, 1, ... of ``1 / (r+1)^2`` within r pixels of the centre; L2 norm 1."""
    down, right = np.arange(rows) - rows // 2, np.arange(columns) - columns // 2
    distance = np.maximum(np.abs(down)[:, None], np.abs(right))
    weights = 1 / np.arange(1, max(rows // 2, columns // 2) + 2) ** 2
    heights = np.cumsum(weights[::-1])[::-1][distance]
    return heights / max(np.linalg.norm(heights), _TINY)


@functools.cache
def pattern(side):
    """The L2 pattern, (side, side), norm 1: a pyramid on top of one pointing down."""
    top, bottom = _pyramid(side // 2, side), _pyramid(side - side // 2, side)
    eta = np.concatenate([top, -bottom])
    return eta / np.linalg.norm(eta)


def _windows(images, side):
    """Writable view of every square window: (N, H-side+1, W-side+1, C, side, side)."""
    return sliding_window_view(images, (side, side), axis=(1, 2), writeable=True)


def _corners(uniform, images, side):
    """Row and column of windows from uniform numbers (N, 2)."""
    return np.floor(uniform * (np.array(images.shape[1:3]) - side)).astype(int).T


class Stripes:
    """Linf: first images and candidates."""

    def __init__(self, x, epsilon, streams):
        self.low, self.high = bounds(x, epsilon)
        self.streams, self.draws = streams, Draws(streams, 2 + x.shape[3])

    def first(self):
        shape = (1, *self.low.shape[2:])
        up = np.array([stream.random(shape) < 0.5 for stream in self.streams])
        return np.where(up, self.high, self.low)

    def next(self, image, active, side):
        uniform = self.draws.next(active)
        corners = _corners(uniform[:, :2], image, side)
        up = uniform[:, 2:, None, None] < 0.5
        high, low = (_windows(a, side)[active, *corners] for a in (self.high, self.low))
        tried = image[active]
        # Every pixel is within epsilon already: adding +-2 epsilon and clipping does the same.
        _windows(tried, side)[np.arange(len(active)), *corners] = np.where(up, high, low)
        return tried


class Pyramids:
    """L2: first images and candidates."""

    def __init__(self, x, epsilon, streams):
        self.x, self.radius = x.astype("float64"), l2_radius(x, epsilon)
        self.streams, self.draws = streams, Draws(streams, 5 + x.shape[3])

    def first(self):
        count, height, width, channels = self.x.shape
        side = max(min(height // 5, width), 1)
        rows, columns = height // side, width // side
        shape = (rows, columns, 1 + channels)
        uniform = np.array([stream.random(shape) for stream in self.streams])
        tiles = _signed(uniform.reshape(-1, 1 + channels), side)
        tiles = tiles.reshape(count, rows, columns, channels, side, side)
        tiles = tiles.transpose(0, 1, 4, 2, 5, 3)  # N, rows, side, columns, side, C
        delta = np.zeros(self.x.shape)
        top, left = (height - rows * side) // 2, (width - columns * side) // 2
        inside = delta[:, top : top + rows * side, left : left + columns * side]
        inside[...] = tiles.reshape(inside.shape)
        return self._images(delta, self.x)

    def next(self, image, active, side):
        uniform, x = self.draws.next(active), self.x[active]
        each = np.arange(len(active))
        first = (each, *_corners(uniform[:, :2], image, side))
        second = (each, *_corners(uniform[:, 2:4], image, side))
        delta = image[active] - x
        unused = np.maximum(self.radius**2 - lengths(delta) ** 2, 0) / x.shape[3]
        windows = _windows(delta, side)
        old = windows[first]
        windows[first] = 0  # where the windows overlap counts once
        budget = np.sqrt(unused + _squares(old) + _squares(windows[second]))
        windows[second] = 0
        new = _signed(uniform[:, 4:], side) + old / (_TINY + np.sqrt(_squares(old)))
        windows[first] = new * (budget / (_TINY + np.sqrt(_squares(new))))
        return self._images(delta, x)

    def _images(self, delta, x):
        """The float32 images at length ``radius`` along ``delta``."""
        delta *= self.radius / (_TINY + lengths(delta))
        return np.clip(x + delta, 0, 1).astype("float32")


def _signed(uniform, side):
    """Patterns (N, C, side, side) from uniform numbers (N, 1 + C): turned, then signed."""
    eta, uniform = pattern(side), uniform[:, :, None, None]
    turned = np.where(uniform[:, :1] < 0.5, eta.T, eta)
    return np.where(uniform[:, 1:] < 0.5, turned, -turned)


def _squares(windows):
    """Sum of squares per example and channel: (N, C, side, side) -> (N, C, 1, 1)."""
    rows = windows.reshape(*windows.shape[:2], -1)
    return np.einsum("ncj,ncj->nc", rows, rows)[:, :, None, None]
