"""Find a data set by what the user wrote after ``--data``."""

from __future__ import annotations

import os
from pathlib import Path

from keras_emr.data import restricted_imagenet
from keras_emr.data.checks import check_arrays
from keras_emr.data.dataset import Dataset, from_arrays
from keras_emr.data.digits import IMAGES, LICENCE, load_digits_arrays, load_split_digits
from keras_emr.data.idx import read_idx_folder
from keras_emr.data.image_folder import is_image_folder, open_image_folder
from keras_emr.data.npz import read_npz
from keras_emr.data.source import Progress, Source, from_checked, to_dataset
from keras_emr.data.stored import STREAM
from keras_emr.data.tfds import PREFIX, open_tfds
from keras_emr.errors import UserError, unknown

_NAMED = {"digits": load_split_digits}
_STORED = ("pictures", "restricted-imagenet", "tfds")
_KINDS = ("digits", "FILE.npz", "FOLDER (of idx files, or of class folders)", "tfds:NAME[:VERSION]")


def load(
    source: str | os.PathLike,
    *,
    split_seed: int = 0,
    validation: float = 0.1,
    image_size: str | tuple[int, int] | None = None,
    skip_bad: bool = False,
    stream: str = "auto",
    tfds_dir: str | os.PathLike | None = None,
    progress: Progress | None = None,
) -> Dataset:
    """Load a data set.

    Args:
        source: ``"digits"``; the path of an ``.npz`` file; a folder with the four MNIST-style idx
            files; a folder of pictures, ``CLASS/...`` or ``train|val|test/CLASS/...``;
            ``"restricted-imagenet:FOLDER"``; or ``"tfds:NAME[:VERSION]"``, prepared on this
            machine. A name wins over a path: write ``./digits`` for a folder of that name.
        split_seed: int >= 0; decides which examples are held out for validation and, where the
            source has no test set, for the test.
        validation: the share held out for validation, in (0, 1), class-stratified, when the source
            has no validation set: of the training set, or, for digits, of all images. A test set
            that the source has is left as given; a folder of pictures or TFDS data set without one
            gives a fifth of its training set first.
        image_size: pictures and TFDS: resize to (H, W) or ``"HxW"``; else all must be of one size.
        skip_bad: pictures: leave out what cannot be used, and say so in ``skipped``.
        stream: pictures and TFDS: ``auto`` reads up to 2 GiB (as float32) into memory and the rest
            batch by batch, ``always`` and ``never`` decide by themselves. The numbers are the same.
        tfds_dir: where TFDS data sets are; else ``TFDS_DATA_DIR``, else ``~/tensorflow_datasets``.
        progress: pictures and TFDS, which are read once before anything else: called with the
            numbers of images read and of all. Images that stay on disk are read
            again at the next start only where a file has changed
            (:func:`keras_emr.data.scan_cache.cache_folder`).

    Returns:
        The data set: float32 images (N, H, W, C) in [0, 1] and int32 labels (N,).

    Raises:
        UserError: unknown name, file not found or unreadable, or images that cannot be used.
    """
    if not isinstance(source, str | os.PathLike) or not os.fspath(source):
        raise UserError(f"data must be a name or a path. Received: {source!r}. Try 'digits'.")
    if stream not in STREAM:
        raise unknown("stream", stream, STREAM)
    split = {"split_seed": split_seed, "validation": validation}
    options = {"image_size": image_size, "skip_bad": skip_bad, "stream": stream}
    kind, path = _kind(os.fspath(source))
    if kind in _STORED:
        return to_dataset(_open_stored(kind, path, options, tfds_dir, progress), **split)
    _refuse_options(os.fspath(source), options)
    if kind == "named":
        return _NAMED[path](**split)
    arrays = read_npz(path) if kind == "npz" else read_idx_folder(path)
    return from_arrays(arrays, name=_name(path), **split)


def open_source(
    source: str,
    *,
    image_size: str | tuple[int, int] | None = None,
    skip_bad: bool = False,
    stream: str = "auto",
    tfds_dir: str | os.PathLike | None = None,
    progress: Progress | None = None,
) -> Source:
    """As :func:`load`, but divided only as the source itself is, and in bytes.

    Raises:
        UserError: also where images are floats that no bytes stand for.
    """
    options = {"image_size": image_size, "skip_bad": skip_bad, "stream": stream}
    kind, path = _kind(source)
    if kind in _STORED:
        return _open_stored(kind, path, options, tfds_dir, progress)
    _refuse_options(source, options)
    if kind == "named":
        x, y = load_digits_arrays()
        return from_checked({"x_train": x, "y_train": y}, path, LICENCE)
    arrays, _ = check_arrays(read_npz(path) if kind == "npz" else read_idx_folder(path))
    return from_checked(arrays, _name(path))


def located(source: str) -> str:
    """``source`` such that it means the same from every folder: a path becomes absolute.

    A name such as ``"digits"`` or ``"tfds:mnist"`` stays; so does what :func:`load` would refuse.
    """
    if not source or source in _NAMED or source.startswith(PREFIX):
        return source
    prefix = restricted_imagenet.PREFIX if source.startswith(restricted_imagenet.PREFIX) else ""
    return prefix + os.path.abspath(os.path.expanduser(source.removeprefix(prefix)))


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
        {
            "name": "FOLDER",
            "what": "pictures: CLASS/..., or train/CLASS/..., test/CLASS/... (optionally val)",
            **facts,
        },
        {
            "name": "restricted-imagenet:FOLDER",
            "what": "nine classes of an ImageNet folder, train/n.../ and val/n.../ (the test set)",
            "images": None,
            "classes": len(restricted_imagenet.RANGES),
            "shape": None,
        },
        {
            "name": "tfds:NAME[:VERSION]",
            "what": "TFDS data set that is prepared on this machine (keras-emr data prepare)",
            **facts,
        },
    ]


def _kind(source: str) -> tuple[str, str]:
    """What ``source`` is, and its name or path."""
    if source in _NAMED:
        return "named", source
    if source.startswith(PREFIX):
        return "tfds", source.removeprefix(PREFIX)
    path = located(source)
    if path.startswith(restricted_imagenet.PREFIX):
        path = path.removeprefix(restricted_imagenet.PREFIX)
        if not os.path.isdir(path):
            raise UserError(f"data folder not found. Received: {source!r}. Check the path.")
        return "restricted-imagenet", path
    is_npz = path.lower().endswith(".npz")
    if is_npz and os.path.exists(path):
        return "npz", path
    if os.path.isdir(path):
        return ("pictures" if is_image_folder(path) else "idx"), path
    if os.path.exists(path):
        raise UserError(
            f"data file is of an unknown kind. Received: {source!r}."
            f" Expected one of: {', '.join(_KINDS)}"
        )
    if is_npz or any(separator in source for separator in (os.sep, os.altsep) if separator):
        raise UserError(f"data file not found. Received: {source!r}. Check the path.")
    raise unknown("data", source, _KINDS)


def _open_stored(kind: str, path: str, options: dict, tfds_dir, progress) -> Source:
    if kind == "pictures":
        return open_image_folder(path, **options, progress=progress)
    if kind == "restricted-imagenet":
        return restricted_imagenet.open_restricted_imagenet(path, **options, progress=progress)
    if options.pop("skip_bad"):
        raise UserError("skip_bad: only for a folder of pictures. Received: TFDS. Leave it out.")
    return open_tfds(path, tfds_dir, **options, progress=progress)


def _refuse_options(source: str, options: dict) -> None:
    for name, default in (("image_size", None), ("skip_bad", False), ("stream", "auto")):
        if options[name] != default and not (name == "stream" and options[name] == "never"):
            raise UserError(
                f"{name}: only for folders of pictures{'' if name == 'skip_bad' else ' and TFDS'}."
                f" Received: {options[name]!r} with {source!r}, which is read as it is. Leave it"
                " out."
            )


def _name(path: str) -> str:
    return Path(path).stem if path.lower().endswith(".npz") else Path(path).name
