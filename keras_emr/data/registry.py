"""Find a data set by what the user wrote after ``--data``."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from keras_emr.data.dataset import Dataset, from_arrays
from keras_emr.data.digits import IMAGES, load_split_digits
from keras_emr.data.idx import read_idx_folder
from keras_emr.data.npz import read_npz
from keras_emr.errors import UserError, unknown

_NAMED = {"digits": load_split_digits}
_FORMATS = ("FILE.npz", "FOLDER (of idx files)")


def load(source: str | os.PathLike, *, split_seed: int = 0, validation: float = 0.1) -> Dataset:
    """Load a data set.

    Args:
        source: ``"digits"``, the path of an ``.npz`` file, or a folder with the four MNIST-style
            idx files. A name wins over a path: write ``./digits`` for a folder of that name.
        split_seed: int >= 0; decides which examples are held out for validation (and, for digits,
            for the test).
        validation: the share held out for validation, in (0, 1), class-stratified, when the source
            has no validation set: of the training set, or, for digits, of all images. The test set
            of a file or folder is left as given.

    Returns:
        The data set: float32 images (N, H, W, C) in [0, 1] and int32 labels (N,).

    Raises:
        UserError: unknown name, file not found or unreadable, or arrays that cannot be used.
    """
    if not isinstance(source, str | os.PathLike) or not os.fspath(source):
        raise UserError(f"data must be a name or a path. Received: {source!r}. Try 'digits'.")
    if source in _NAMED:
        return _NAMED[source](split_seed=split_seed, validation=validation)
    path = Path(located(os.fspath(source)))
    arrays = _read(os.fspath(source), path)
    name = path.stem if path.suffix.lower() == ".npz" else path.name
    return from_arrays(arrays, name=name, split_seed=split_seed, validation=validation)


def located(source: str) -> str:
    """``source`` such that it means the same from every folder: a path becomes absolute.

    A name such as ``"digits"`` stays; so does what :func:`load` would refuse.
    """
    if not source or source in _NAMED:
        return source
    return os.path.abspath(os.path.expanduser(source))


def available() -> list[dict]:
    """What :func:`load` accepts: one dict each, with name, what, images, classes and shape.

    ``images``, ``classes`` and ``shape`` (H, W, C) are None where they depend on the file.
    """
    facts = {"images": None, "classes": None, "shape": None}
    return [
        {
            "name": "digits",
            "what": "handwritten digits of scikit-learn (embedded): 1257 train, 180 val, 360 test",
            "images": IMAGES,
            "classes": 10,
            "shape": (8, 8, 1),
        },
        {
            "name": "FILE.npz",
            "what": "NumPy archive: x_train, y_train, x_test, y_test (optionally x_val, y_val);"
            " images (N, H, W[, C]), uint8 or float in [0, 1]",
            **facts,
        },
        {
            "name": "FOLDER",
            "what": "MNIST-style idx files: train-images-idx3-ubyte, train-labels-idx1-ubyte,"
            " t10k-images-idx3-ubyte, t10k-labels-idx1-ubyte (optionally .gz)",
            **facts,
        },
    ]


def _read(source: str, path: Path) -> dict[str, np.ndarray]:
    is_npz = path.suffix.lower() == ".npz"
    if is_npz and os.path.exists(path):
        return read_npz(path)
    if os.path.isdir(path):
        return read_idx_folder(path)
    if os.path.exists(path):
        raise UserError(
            f"data file is of an unknown kind. Received: {source!r}."
            f" Expected one of: {', '.join([*_NAMED, *_FORMATS])}"
        )
    if is_npz or any(separator in source for separator in (os.sep, os.altsep) if separator):
        raise UserError(f"data file not found. Received: {source!r}. Check the path.")
    raise unknown("data", source, [*_NAMED, *_FORMATS])
