"""Read one picture file as bytes of pixels."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np

from keras_emr.errors import UserError

SUFFIXES = frozenset(
    (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".pnm")
)
KINDS = {1: "grey", 3: "RGB"}
_ORIENTATION = 0x0112  # the EXIF tag; from 5 on height and width change places


class BadPicture(UserError):
    """A picture that cannot be used; ``skip_bad`` leaves it out."""


def look(path: Path) -> tuple[int, int, int]:
    """(H, W, C) from a picture's header, upright; C is 1 for grey, 3 for everything else.

    Raises:
        BadPicture: not a picture, or absurdly large.
    """
    with _opened(path, path) as image:
        return *_size(image), 1 if _is_grey(image.mode) else 3


def picture_size(file: BinaryIO, name: str) -> tuple[int, int]:
    """(H, W) from a picture's header, upright; ``name`` is what messages call it."""
    with _opened(file, name) as image:
        return _size(image)


def read_picture(
    file: Path | BinaryIO, shape: tuple[int, int, int], name: str | None = None
) -> np.ndarray:
    """The pixels of a picture, turned upright as EXIF says and resized where its size differs.

    Resizing is bilinear and antialiased, without keeping the ratio of the sides. Of several frames
    the first is read, transparency is dropped, and 16-bit grey is brought to 8 bits.

    Args:
        file: what Pillow reads.
        shape: (H, W, C) that is wanted; C is 1 or 3.
        name: what messages call it; ``None``: its path.

    Returns:
        uint8 array of that shape.

    Raises:
        BadPicture: unreadable, truncated, absurdly large, or float pixels.
    """
    from PIL import Image, ImageOps

    height, width, channels = shape
    name = name or str(file)
    with _opened(file, name) as image:
        image.load()
        image = ImageOps.exif_transpose(image)
        if image.mode == "F":
            raise BadPicture(
                f"image of floating-point pixels. Received: {name!r}. Expected 8 or 16 bits:"
                " save it again, or leave it out with --skip-bad."
            )
        if image.mode.startswith("I"):  # 16-bit grey; Pillow's own conversion would clip it
            deep = np.asarray(image).astype(np.float64)
            image = Image.fromarray(np.clip(np.rint(deep / 257), 0, 255).astype(np.uint8))
        image = image.convert("L" if channels == 1 else "RGB")
        if image.size != (width, height):
            image = image.resize((width, height), Image.Resampling.BILINEAR)
        return np.asarray(image).reshape(shape)


def _is_grey(mode: str) -> bool:
    return mode in ("1", "L", "LA", "La", "F") or mode.startswith("I")


def _size(image) -> tuple[int, int]:
    width, height = image.size
    return (width, height) if image.getexif().get(_ORIENTATION, 1) >= 5 else (height, width)


@contextmanager
def _opened(file: Path | BinaryIO, name: Path | str) -> Iterator:
    from PIL import Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd metadata
            with Image.open(file) as image:
                yield image
    except UserError:
        raise
    except Exception as error:  # a damaged file can fail in any way
        reason = " ".join(str(error).split()) or type(error).__name__
        if "cannot identify" in reason:  # Pillow names the file again
            reason = "not a picture"
        raise BadPicture(
            f"image cannot be read: {reason.rstrip('.')}. Received: {str(name)!r}."
            " Repair or remove it, or leave out such images with --skip-bad."
        ) from None
