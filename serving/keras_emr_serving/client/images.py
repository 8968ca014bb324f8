"""Image files and arrays as a model takes them: float32 (H, W, C) in [0, 1]."""

from __future__ import annotations

import warnings
import zipfile
from pathlib import Path

import numpy as np

from keras_emr.errors import UserError
from keras_emr_serving.client.resize import resize

_MODES = {1: "L", 3: "RGB", 4: "RGBA"}
_ARRAYS = (".npy", ".npz")
# Unpacked; what is larger is no batch of images to send.
_LARGEST_FILE = 2 << 30
# As long as JPEG's: resizing takes memory for each pixel of a side and each of the new one.
_LONGEST_SIDE = 65_535
# Names under which arrays of images stand in .npz files, the first that is there.
_NAMES = ("x_test", "x", "images")


def read_images(path, shape):
    """The images in a file.

    A picture (anything that Pillow reads: grey, RGB, RGBA, palette, 16 bit, CMYK, ...; the first
    frame) is turned as its EXIF orientation says, converted to the model's channels (grey as
    0.299 R + 0.587 G + 0.114 B, transparency dropped) and resized to (H, W), bilinear and
    antialiased, without keeping the ratio of its sides. Arrays (``.npy``; ``.npz`` with one array,
    ``x_test``, ``x`` or ``images``) are one image or N, of the model's size as they are.

    Args:
        path: of the file.
        shape: (H, W, C) of the model, H and W ``None`` where any will do.

    Returns:
        List of ``(index, image)``: ``None`` for a picture or a single image, else 0 to N - 1; image
        (H, W, C) float32 in [0, 1].

    Raises:
        UserError: no such file, not an image, damaged, far too large, or of another shape.
    """
    path = Path(path)
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "no such file"
        raise UserError(f"image: {what}. Received: {str(path)!r}. Expected an image file.")
    if path.suffix.lower() in _ARRAYS:
        array = _read_array(path)
        images = checked(path.name, array, shape)
        return [(None, images[0])] if _batch(array, shape)[1] else list(enumerate(images))
    return [(None, resize(_read_picture(path, shape[2]), shape[:2]))]


def checked(field, images, shape):
    """Images as an array (N, H, W, C) float32 in [0, 1].

    Args:
        field: what messages call them.
        images: (N, H, W, C), (N, H, W) of one channel, or a single image; uint8 or float.
        shape: (H, W, C) of the model, ``None`` for a side that is free.

    Raises:
        UserError: another shape or type, nothing at all, or values outside [0, 1].
    """
    images = np.asarray(images)
    if images.dtype != np.uint8 and images.dtype.kind != "f":
        raise UserError(
            f"{field}: images must be uint8, or float in [0, 1]. Received: dtype {images.dtype}."
        )
    given = images.shape
    images, _ = _batch(images, shape)
    if images.ndim != 4 or not _fit(images.shape[1:], shape) or images.size == 0:
        wanted = ", ".join("any" if side is None else str(side) for side in shape)
        raise UserError(
            f"{field}: the model takes other images. Received: shape {given}. Expected "
            f"(N, {wanted})."
        )
    if images.dtype == np.uint8:
        return images.astype("float32") / np.float32(255)
    low, high = images.min(), images.max()
    if not (low >= 0 and high <= 1):  # NaN is neither
        raise UserError(
            f"{field}: values must be in [0, 1]. Received: {low:g} to {high:g}. Divide by 255, or "
            "give uint8."
        )
    return images.astype("float32")


def _batch(images, shape):
    """The images with axes for their number and for channels; whether it is a single one."""
    if _fit(images.shape, shape):
        return images[None], True
    if shape[2] == 1 and images.ndim in (2, 3):
        images = images[..., None]
        if _fit(images.shape, shape):
            return images[None], True
    return images, False


def _fit(sides, shape):
    return len(sides) == 3 and all(
        want in (None, has) for want, has in zip(shape, sides, strict=True)
    )


def _read_array(path):
    try:
        zipped = path.suffix.lower() == ".npz"
        if zipped:
            with zipfile.ZipFile(path) as archive:
                size = sum(member.file_size for member in archive.infolist())
        else:
            size = path.stat().st_size
        if size > _LARGEST_FILE:
            raise UserError(
                f"image: {size} bytes unpacked. Received: {str(path)!r}. Expected at most "
                f"{_LARGEST_FILE}."
            )
        if not zipped:
            # Mapped: what the header claims is not reserved before it is found to be there.
            return np.load(path, mmap_mode="r", allow_pickle=False)
        with np.load(path, allow_pickle=False) as archive:
            if not archive.files:
                raise ValueError("no array in it")
            names = [n for n in _NAMES if n in archive.files] or archive.files
            if names[0] not in _NAMES and len(names) != 1:
                raise UserError(
                    f"image: several arrays: {', '.join(names[:5])}. Received: {str(path)!r}. "
                    f"Expected one of {', '.join(_NAMES)}, or a single one."
                )
            return archive[names[0]]
    except UserError:
        raise
    except Exception as error:  # a damaged file can fail in any way
        raise _unreadable(path, error) from None


def _read_picture(path, channels):
    """(height, width, channels) uint8, or float32 in [0, 1]."""
    try:
        from PIL import Image
    except ImportError as error:
        raise UserError(
            f"image: a package is missing. Received: {error}. Expected Pillow: pip install pillow."
        ) from None
    if channels not in _MODES:
        raise UserError(
            f"image: the model takes {channels} channels. Received: {str(path)!r}. Expected arrays "
            "(.npy) for other numbers than 1, 3 and 4."
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd metadata, and of the size, looked at here
            with Image.open(path) as image:
                width, height = image.size
                if width * height > Image.MAX_IMAGE_PIXELS or max(width, height) > _LONGEST_SIDE:
                    raise _too_large(path, f"{width} x {height} pixels", Image.MAX_IMAGE_PIXELS)
                return _pixels(path, image, channels)
    except UserError:
        raise
    except Image.DecompressionBombError:
        raise _too_large(path, "too many pixels", Image.MAX_IMAGE_PIXELS) from None
    except Exception as error:  # a damaged file can fail in any way
        raise _unreadable(path, error) from None


def _pixels(path, image, channels):
    from PIL import ImageOps

    image.load()
    image = ImageOps.exif_transpose(image)
    if image.mode == "F" or image.mode.startswith("I"):
        grey = _deep(path, np.asarray(image), image.mode)
        grey = np.repeat(grey[..., None], channels, axis=-1)
        if channels == 4:
            grey[..., 3] = 1
        return grey
    if image.mode == "LAB":  # the one that Pillow converts by colour profile alone
        image = _from_lab(image)
    array = np.asarray(image.convert(_MODES[channels]))
    return array[..., None] if array.ndim == 2 else array


def _deep(path, array, mode):
    """Grey of more than 8 bits as float32 in [0, 1]."""
    array = array.astype("float32")
    if mode != "F":
        array /= 65535
    if not (array.min() >= 0 and array.max() <= 1):
        expected = "values in [0, 1]" if mode == "F" else "at most 16 bits"
        raise UserError(
            f"image: grey values out of range. Received: {str(path)!r}. Expected {expected}."
        )
    return array


def _from_lab(image):
    from PIL import ImageCms

    profiles = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
    return ImageCms.profileToProfile(image, *profiles, outputMode="RGB")


def _too_large(path, size, most):
    return UserError(
        f"image: too large to be unpacked: {size}. Received: {str(path)!r}. Expected at most "
        f"{most} pixels, and {_LONGEST_SIDE} on a side."
    )


def _unreadable(path, error):
    lines = str(error).strip().splitlines()
    # Pillow names the file again where it knows no such format.
    reason = lines[0] if lines and "cannot identify" not in lines[0] else "not an image"
    return UserError(
        f"image: cannot be read: {reason.rstrip('.')}. Received: {str(path)!r}. Expected a picture "
        "or an array."
    )
