"""The ball around each clean image and its part in [0, 1], in NumPy: for attacks that only ask."""

import numpy as np

# Most that rounding to float32 moves a number in [0, 1].
_ROUNDING = 2.0**-25


def bounds(x, epsilon):
    """Least and greatest pixels within ``epsilon`` (linf) and [0, 1]: float32, shapes of ``x``."""
    x = np.asarray(x, "float64")
    low, high = np.clip(x - epsilon, 0, 1), np.clip(x + epsilon, 0, 1)
    return low.astype("float32"), high.astype("float32")


def l2_radius(x, epsilon):
    """The L2 length that float32 images may have and still lie within ``epsilon``.

    Where a flat image gets a flat perturbation every pixel is rounded the same way, so that over
    many pixels the error would be seen.
    """
    return max(epsilon - _ROUNDING * float(np.sqrt(np.prod(x.shape[1:]))), 0.0)


def lengths(delta):
    """L2 norm of each example: (N, ...) -> (N, 1, 1, 1)."""
    rows = delta.reshape(len(delta), -1)
    return np.sqrt(np.einsum("ij,ij->i", rows, rows))[:, None, None, None]


def project(images, x, epsilon, norm):
    """The float32 images within ``epsilon`` of ``x`` and in [0, 1] that stand for ``images``.

    Linf: each pixel clipped. L2: shrunk towards ``x`` onto the ball, then clipped to [0, 1].
    """
    if norm == "linf":
        low, high = bounds(x, epsilon)
        return np.clip(images, low, high).astype("float32")
    delta = images - np.asarray(x, "float64")
    scale = np.minimum(1, l2_radius(x, epsilon) / np.maximum(lengths(delta), 1e-30))
    return np.clip(x + delta * scale, 0, 1).astype("float32")
