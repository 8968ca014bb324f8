"""Read a TFDS data set that is prepared on this machine: no network, and no TensorFlow."""

from __future__ import annotations

import difflib
import io
import os
import re
from pathlib import Path

import numpy as np

from keras_emr.data.dataset import NO_LICENCE
from keras_emr.data.folder_listing import SPLITS
from keras_emr.data.image_folder import parse_size
from keras_emr.data.pictures import picture_size, read_picture
from keras_emr.data.records import damaged, open_records
from keras_emr.data.scan_cache import key_of
from keras_emr.data.source import Progress, Source, scan, shifted
from keras_emr.data.stored import fits_memory
from keras_emr.errors import UserError

PREFIX = "tfds:"
_VERSION = re.compile(r"\d+\.\d+\.\d+")
_CHUNK = 256


def open_tfds(
    name: str,
    data_dir: str | os.PathLike | None = None,
    *,
    image_size: tuple[int, int] | str | None = None,
    stream: str = "auto",
    progress: Progress | None = None,
) -> Source:
    """Find, check and hash the images of a prepared data set, in array_record or tfrecord files.

    Args:
        name: ``NAME[/CONFIG][:VERSION]``; without a version the highest.
        data_dir: as in :func:`data_folder`.
        image_size: (H, W) or ``"HxW"``; ``None``: the size that all have.
        stream: ``auto``, ``always`` or ``never``; see :func:`keras_emr.data.stored.fits_memory`.
        progress: called with the numbers of images read and of all.

    Returns:
        The source; its splits are ``train`` and, where there are any, validation and ``test``.

    Raises:
        UserError: tensorflow-datasets is not installed, the data set is not prepared here, it has
            no training split or not one image and one label, or it is damaged.
    """
    size = parse_size(image_size)
    folder = _prepared(name, data_folder(data_dir))
    tfds = require_tfds()
    try:
        builder = tfds.builder_from_directory(folder)
        features, info = builder.info.features, builder.info
        splits = _splits(list(info.splits), name)
        instructions = {ours: info.splits[s].file_instructions for ours, s in splits.items()}
        licence = info.as_proto.redistribution_info.license or NO_LICENCE
    except UserError:
        raise
    except Exception as error:  # damaged metadata can fail in any way
        raise damaged(str(folder), error) from None
    image, label = _features(tfds, features, info.supervised_keys, name)
    decoders = {image: tfds.decode.SkipDecoding()}
    file_format = info.file_format.value

    def examples(records):
        try:
            found = [features.deserialize_example_np(r, decoders=decoders) for r in records]
            return [(bytes(e[image]), int(e[label])) for e in found]
        except Exception as error:
            raise damaged(str(folder), error) from None

    readers, labels, sizes = {}, {}, set()
    for split, shards in instructions.items():
        records, count = open_records(file_format, shards)
        readers[split], labels[split] = records, np.empty(count, np.int32)
        for start in range(0, count, _CHUNK):
            chunk = np.arange(start, min(start + _CHUNK, count))
            for i, (encoded, number) in zip(chunk, examples(records(chunk)), strict=True):
                labels[split][i] = number
                if size is None:
                    sizes.add(picture_size(io.BytesIO(encoded), f"{name} {split} {i}"))
    if len(sizes) > 1:
        raise UserError(
            f"images differ in size. Received: {len(sizes)} sizes in {PREFIX + name!r}. Expected"
            " one size, or --image-size HxW to resize to."
        )
    shape = (*(size or sizes.pop()), features[image].shape[-1])
    total, seen = sum(map(len, labels.values())), 0
    keep = fits_memory(total, shape, stream)
    parts = {}
    for split, records in readers.items():
        read = _reader(records, examples, shape, f"{name} {split}")
        key = None if keep else key_of(sorted(folder.iterdir()), f"tfds {split} {shape}")
        told = shifted(progress, seen, total)
        parts[split] = scan(read, labels[split], shape, keep, key=key, progress=told)
        seen += len(labels[split])
    class_names = tuple(features[label].names)
    for split, numbers in labels.items():
        if not len(numbers) or not 0 <= numbers.min() <= numbers.max() < len(class_names):
            raise UserError(
                f"tfds: unusable labels. Received: {split} of {PREFIX + name!r}. Expected numbers"
                f" from 0 to {len(class_names) - 1}, and at least one example."
            )
    return Source(name.split(":")[0].replace("/", "-"), parts, class_names, shape, licence)


def data_folder(given: str | os.PathLike | None = None) -> Path:
    """Where prepared data sets are: ``given``, else TFDS_DATA_DIR, else ~/tensorflow_datasets."""
    folder = given or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
    return Path(os.path.abspath(os.path.expanduser(folder)))


def require_tfds():
    """The module tensorflow_datasets.

    Raises:
        UserError: it is not installed.
    """
    try:
        import tensorflow_datasets as tfds

        return tfds
    except ImportError as error:
        raise UserError(
            f"tfds: data sets of TFDS need tensorflow-datasets. Received: {error}. Install it with:"
            " pip install 'keras-emr[data]'"
        ) from None


def _prepared(name: str, data_dir: Path) -> Path:
    """The folder of the version asked for."""
    match = re.fullmatch(r"([A-Za-z]\w*(?:/[\w.+-]+)?)(?::([\w.]+))?", name)
    if not match:
        raise UserError(
            f"tfds: not a name. Received: {PREFIX + name!r}. Expected tfds:NAME[/CONFIG][:VERSION]."
        )
    stem, version = match.groups()
    versions = _versions(data_dir / stem)
    if version in versions or (version is None and versions):
        return data_dir / stem / (version or versions[-1])
    if versions:
        what = f"version {version} is not prepared here. Expected one of: {', '.join(versions)}"
    else:
        there = _all_prepared(data_dir)
        close = difflib.get_close_matches(stem, there, n=1)
        hint = f" (did you mean {close[0]!r}?)" if close else ""
        what = (
            f"not prepared here, and nothing is downloaded. Expected one of:"
            f" {', '.join(there) or 'none is there'}{hint}"
        )
    raise UserError(
        f"tfds: {what}. Received: {PREFIX + name!r} with --tfds-dir {str(data_dir)!r}. Make one"
        " with: keras-emr data prepare"
    )


def _versions(folder: Path) -> list[str]:
    if not folder.is_dir():
        return []
    found = [p.parent.name for p in folder.glob("*/dataset_info.json")]
    found = [v for v in found if _VERSION.fullmatch(v)]
    return sorted(found, key=lambda v: [int(n) for n in v.split(".")])


def _all_prepared(data_dir: Path) -> list[str]:
    found = [*data_dir.glob("*/*/dataset_info.json"), *data_dir.glob("*/*/*/dataset_info.json")]
    names = {p.parent.parent.relative_to(data_dir).as_posix() for p in found}
    return sorted(name for name in names if not name.startswith("."))


def _splits(there: list[str], name: str) -> dict[str, str]:
    """Our name of each split -> theirs."""
    found = {}
    for ours, names in SPLITS.items():
        known = [split for split in there if split in names]
        if known:
            found[ours] = known[0]
    if "train" not in found:
        raise UserError(
            f"tfds: no training split. Received: {PREFIX + name!r} with {', '.join(there)}."
            " Expected a split named train."
        )
    return found


def _features(tfds, features, supervised, name: str) -> tuple[str, str]:
    """The names of the image and of the label."""
    try:
        kinds = {"image": tfds.features.Image, "label": tfds.features.ClassLabel}
        images, labels = (
            [key for key, feature in features.items() if isinstance(feature, kind)]
            for kind in kinds.values()
        )
    except AttributeError:  # a single feature, not a dictionary
        images, labels = [], []
    if supervised and supervised[0] in images and supervised[1] in labels:
        images, labels = [supervised[0]], [supervised[1]]
    if len(images) != 1 or len(labels) != 1:
        raise UserError(
            f"tfds: one image and one class label are needed. Received: {len(images)} images and"
            f" {len(labels)} class labels in {PREFIX + name!r}. Expected an image classification"
            " data set."
        )
    feature = features[images[0]]
    if feature.np_dtype != np.uint8 or feature.shape[-1] not in (1, 3):
        raise UserError(
            f"tfds: images of another kind. Received: {np.dtype(feature.np_dtype).name} with"
            f" {feature.shape[-1]} channels in {PREFIX + name!r}. Expected uint8 with 1 or 3."
        )
    return images[0], labels[0]


def _reader(records, examples, shape, what: str):
    def read(index):
        found = zip(index, examples(records(index)), strict=True)
        return np.stack(
            [read_picture(io.BytesIO(image), shape, f"{what} {i}") for i, (image, _) in found]
        )

    return read
