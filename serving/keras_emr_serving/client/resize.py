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
    tall, wide = (
        has if want is None else want for has, want in zip((height, width), size, strict=True)
    )
    scale = np.float32(255 if image.dtype == np.uint8 else 1)
    if (tall, wide) == (height, width):
        return image.astype("float32") / scale
    # A side that stays needs no weights: as many as its length squared.
    down = None if tall == height else _weights(height, tall)
    across = None if wide == width else _weights(width, wide)
    out = np.zeros((tall, wide, channels), "float32")
    for begin in range(0, height, _ROWS):
        rows = image[begin : begin + _ROWS].astype("float32") / scale
        if across is not None:
            rows = np.einsum("ow,hwc->hoc", across, rows, optimize=True)
        if down is None:
            out[begin : begin + _ROWS] = rows
        else:
            part = down[:, begin : begin + _ROWS]
            out += np.einsum("oh,hwc->owc", part, rows, optimize=True)
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
