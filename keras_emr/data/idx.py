"""Read a folder with the four idx files in which MNIST and its relatives are distributed."""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from pathlib import Path

import numpy as np

from keras_emr.errors import UserError

# array -> (stem, number of axes); the file is STEM-idxN-ubyte or STEM.idxN-ubyte, maybe with .gz
_FILES = {
    "x_train": ("train-images", 3),
    "y_train": ("train-labels", 1),
    "x_test": ("t10k-images", 3),
    "y_test": ("t10k-labels", 1),
}
_UINT8 = 0x08


def read_idx_folder(folder: str | Path) -> dict[str, np.ndarray]:
    """The arrays of an idx folder.

    Args:
        folder: holds ``train-images-idx3-ubyte``, ``train-labels-idx1-ubyte`` and the same for
            ``t10k``, each optionally with ``.gz``; ``train-images.idx3-ubyte`` is read as well.

    Returns:
        ``x_train, y_train, x_test, y_test``: uint8 images (N, H, W) and uint8 labels (N,).

    Raises:
        UserError: a file is missing, truncated, too long or not of this format; it is named.
    """
    folder = Path(folder)
    return {
        key: read_idx(_find(folder, f"{stem}-idx{axes}-ubyte"), axes)
        for key, (stem, axes) in _FILES.items()
    }


def read_idx(path: str | Path, axes: int) -> np.ndarray:
    """One idx file of bytes, plain or gzipped (told by its content, not its name).

    The format: two zero bytes, the type (8 is uint8), the number of axes, each axis's length as a
    big-endian 32-bit integer, then the values.

    Args:
        path: the file.
        axes: the number of axes it must have.

    Returns:
        uint8 array, read-only.

    Raises:
        UserError: unreadable, another format, or the size does not match the header.
    """
    path = Path(path)
    try:
        raw = path.read_bytes()
        if raw[:2] == b"\x1f\x8b":
            raw = gzip.decompress(raw)
    except (OSError, EOFError, zlib.error) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"idx file cannot be read. Received: {str(path)!r} ({type(error).__name__}: {reason})."
            " Download it again."
        ) from error

    header = 4 + 4 * axes
    magic = bytes([0, 0, _UINT8, axes])
    if raw[:4] != magic:
        raise UserError(
            f"not an idx file of uint8 with {axes} axes. Received: {str(path)!r}, which starts with"
            f" 0x{raw[:4].hex()}. Expected 0x{magic.hex()}: check that this is the right file."
        )
    if len(raw) < header:
        raise _wrong_size(path, len(raw), f"a header of {header} bytes")
    shape = struct.unpack(f">{axes}I", raw[4:header])
    if len(raw) != header + math.prod(shape):
        raise _wrong_size(path, len(raw), f"{header + math.prod(shape)} for shape {shape}")
    return np.frombuffer(raw, np.uint8, offset=header).reshape(shape)


def _find(folder: Path, name: str) -> Path:
    spellings = [name, name.replace("-idx", ".idx")]
    for candidate in [spelling + end for spelling in spellings for end in ("", ".gz")]:
        if (folder / candidate).is_file():
            return folder / candidate
    raise UserError(
        f"idx file not found: {name} (or {name}.gz). Received: folder {str(folder)!r}."
        " Expected the four files train-images-idx3-ubyte, train-labels-idx1-ubyte,"
        " t10k-images-idx3-ubyte, t10k-labels-idx1-ubyte, each optionally with .gz."
    )


def _wrong_size(path: Path, received: int, expected: str) -> UserError:
    return UserError(
        f"idx file has the wrong size. Received: {str(path)!r} with {received} bytes"
        f" (uncompressed). Expected {expected}: download it again."
    )
