"""Read a NumPy ``.npz`` archive."""

from __future__ import annotations

import lzma
import os
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from keras_emr.errors import UserError

REQUIRED = ("x_train", "y_train", "x_test", "y_test")
OPTIONAL = ("x_val", "y_val")

# What NumPy and zipfile raise for a damaged file, depending on where the damage is.
# RuntimeError is an unknown compression method or encryption; MemoryError an absurd shape.
_DAMAGE = (
    OSError,
    EOFError,
    ValueError,
    KeyError,
    RuntimeError,
    MemoryError,
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
)


def read_npz(path: str | Path) -> dict[str, np.ndarray]:
    """The arrays of a data file, unchecked.

    Args:
        path: an archive with ``x_train, y_train, x_test, y_test`` and optionally ``x_val, y_val``
            (both or neither). Other arrays in it are ignored, and not read.

    Returns:
        The arrays by name.

    Raises:
        UserError: no such file, not an archive, truncated or corrupt, an array is missing or is
            pickled. Pickles are never loaded: they could run code.
    """
    return _read_chosen(Path(path), _wanted)


def read_arrays(path: str | Path, names: Sequence[tuple[str, ...]]) -> dict[str, np.ndarray]:
    """The first of several sets of arrays that an archive has, unchecked.

    Args:
        path: an archive.
        names: the sets, e.g. ``[("x", "y"), ("image", "label")]``.

    Raises:
        UserError: as :func:`read_npz`.
    """

    def choose(path: Path, present: list[str]) -> tuple[str, ...]:
        for wanted in names:
            if all(name in present for name in wanted):
                return wanted
        raise UserError(
            f"data file lacks arrays. Received: {str(path)!r} with"
            f" {', '.join(present) or 'no arrays'}. Expected"
            f" {', or '.join(' and '.join(wanted) for wanted in names)}."
        )

    return _read_chosen(Path(path), choose)


def _read_chosen(path: Path, choose) -> dict[str, np.ndarray]:
    if not os.path.exists(path):  # unlike Path.exists, false for a path that is too long
        raise UserError(f"data file not found. Received: {str(path)!r}. Check the path.")
    try:
        with path.open("rb") as file:
            archive = np.load(file, allow_pickle=False)
            if not isinstance(archive, np.lib.npyio.NpzFile):
                raise ValueError("it holds one array, not an archive of arrays")
            return {key: _read(path, archive, key) for key in choose(path, archive.files)}
    except UserError:
        raise
    except _DAMAGE as error:
        raise _unreadable(path, error) from error


def _wanted(path: Path, present: list[str]) -> list[str]:
    wanted = [*REQUIRED, *(OPTIONAL if any(key in present for key in OPTIONAL) else ())]
    missing = [key for key in wanted if key not in present]
    if missing:
        raise UserError(
            f"data file lacks {', '.join(missing)}. Received: {str(path)!r} with"
            f" {', '.join(present) or 'no arrays'}. Expected x_train, y_train, x_test, y_test,"
            " and x_val with y_val or neither."
        )
    return wanted


def _read(path: Path, archive: np.lib.npyio.NpzFile, key: str) -> np.ndarray:
    try:
        array = archive[key]
    except ValueError as error:
        if "Object arrays" not in str(error):
            raise
        raise UserError(
            f"{key}: a plain numeric array is needed. Received: an object array in"
            f" {str(path)!r}. Make all images the same size, stack them and save again."
        ) from error
    if not isinstance(array, np.ndarray):  # NumPy gives the bytes of a member that is no array
        raise ValueError(f"member {key} is not an array")
    return array


def _unreadable(path: Path, error: BaseException) -> UserError:
    # NumPy takes anything that is neither .npy nor zip for a pickle, which would mislead here.
    reason = "not a zip archive" if "pickle" in str(error) else " ".join(str(error).split())
    return UserError(
        f"data file is not a readable .npz archive. Received: {str(path)!r}"
        f" ({type(error).__name__}: {reason or 'ends too early'})."
        " Copy it again, or write it again with numpy.savez_compressed."
    )
