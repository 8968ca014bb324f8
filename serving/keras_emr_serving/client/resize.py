"""Bilinear resizing with antialiasing, as ``tf.image.resize(..., antialias=True)`` does it."""

from __future__ import annotations

import numpy as np

_ROWS = 256  # that are float32 at a time: a large picture as a whole would take four times its size


def resize(image, size):
    """Resize one image.

    Args:
        image: (h, w, C) uint8 (divided by 255), or float32 in [0, 1].
        size: (H, W), a side ``None``: left as it is.

    Returns:
        (H, W, C) float32 in [0, 1].
    """
    height, width, channels = image.shape
    down = _weights(height, height if size[0] is None else size[0])
    across = _weights(width, width if size[1] is None else size[1])
    scale = np.float32(255 if image.dtype == np.uint8 else 1)
    out = np.zeros((len(down), len(across), channels), "float32")
    if len(down) == height and len(across) == width:
        return image.astype("float32") / scale
    for begin in range(0, height, _ROWS):
        rows = image[begin : begin + _ROWS].astype("float32") / scale
        narrow = np.einsum("ow,hwc->hoc", across, rows, optimize=True)
        out += np.einsum("oh,hwc->owc", down[:, begin : begin + _ROWS], narrow, optimize=True)
    return np.clip(out, 0, 1)  # sums of weights round


def _weights(given, wanted):
    """Share of each of ``given`` pixels in each of ``wanted``: (wanted, given) float32.

    A triangle around each new pixel's centre, as wide as the distance of two of them, or of two
    old ones where the image grows; what lies outside the image is left out.
    """
    ratio = given / wanted
    centre = (np.arange(wanted) + 0.5) * ratio
    away = np.abs(np.arange(given) + 0.5 - centre[:, None]) / max(ratio, 1.0)
    weights = np.maximum(0.0, 1.0 - away)
    return (weights / weights.sum(axis=1, keepdims=True)).astype("float32")
