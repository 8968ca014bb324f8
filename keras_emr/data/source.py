"""What a source of images holds, before it is divided, scaled and, if it fits, read as a whole."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

from keras_emr.data import scan_cache
from keras_emr.data.checks import to_unit_float
from keras_emr.data.dataset import NO_LICENCE, Dataset
from keras_emr.data.split import check_fraction, stratified_split
from keras_emr.data.stored import Read, StoredImages
from keras_emr.errors import UserError

TEST_SHARE = 0.2
_CHUNK = 64
_DIGEST = 16

Progress = Callable[[int, int], None]


@dataclass(frozen=True, eq=False)
class Part:
    """One split as its source gives it.

    Attributes:
        read: from int64 indices (n,) to uint8 images (n, H, W, C).
        labels: int32 (N,).
        digests: a hash of every image's pixels, uint8 (N, 16).
        extremes: smallest and largest pixel of every image, two uint8 arrays (N,).
        in_memory: whether ``read`` indexes an array.
    """

    read: Read
    labels: np.ndarray
    digests: np.ndarray
    extremes: tuple[np.ndarray, np.ndarray]
    in_memory: bool

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True, eq=False)
class Source:
    """All splits of a source: ``train`` and, where it has them, ``val`` and ``test``."""

    name: str
    parts: dict[str, Part]
    class_names: tuple[str, ...]
    image_shape: tuple[int, int, int]
    licence: str = NO_LICENCE
    skipped: tuple[str, ...] = field(default=())

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of class names, shape, labels and pixels, in memory or not."""
        digest = hashlib.sha256(f"{self.class_names} {self.image_shape};".encode())
        for name, part in self.parts.items():
            digest.update(f"{name} {len(part)};".encode())
            digest.update(np.ascontiguousarray(part.labels, "<i4").tobytes())
            digest.update(part.digests.tobytes())
        return digest.hexdigest()


def digest_of(image: np.ndarray) -> np.ndarray:
    """A hash of an image's pixels, as uint8 (16,)."""
    raw = hashlib.blake2b(np.ascontiguousarray(image), digest_size=_DIGEST).digest()
    return np.frombuffer(raw, np.uint8)


def scan(
    read: Read,
    labels: np.ndarray,
    image_shape,
    keep: bool,
    bad=None,
    *,
    key: str | None = None,
    progress: Progress | None = None,
) -> Part:
    """Read every image once: hash it, and hold it if it is to be kept in memory.

    Args:
        read: as in :class:`Part`.
        labels: (N,).
        image_shape: (H, W, C) of all images.
        keep: hold the images in memory.
        bad: called with a :class:`UserError` and an index where one image cannot be read; that
            image is left out. ``None``: the error is raised.
        key: of :func:`keras_emr.data.scan_cache.key_of`. With it, images that are not held and
            were found good once are not read again.
        progress: called with the numbers of images read and of all.
    """
    n = len(labels)
    found = {
        "digests": np.empty((n, _DIGEST), np.uint8),
        "low": np.empty(n, np.uint8),
        "high": np.empty(n, np.uint8),
    }
    good = np.ones(n, bool)
    held = np.empty((n, *image_shape), np.uint8) if keep else None
    if keep or key is None or not scan_cache.recall(key, found):
        for start in range(0, n, _CHUNK):
            chunk = np.arange(start, min(start + _CHUNK, n))
            for i, image in zip(chunk, _each(read, chunk, bad), strict=True):
                if image is None:
                    good[i] = False
                    continue
                found["digests"][i] = digest_of(image)
                found["low"][i], found["high"][i] = image.min(), image.max()
                if held is not None:
                    held[i] = image
            if progress is not None:
                progress(int(chunk[-1]) + 1, n)
        if not keep and key is not None and good.all():
            scan_cache.keep(key, found)
    extremes = found["low"], found["high"]
    part = Part(held.__getitem__ if keep else read, labels, found["digests"], extremes, keep)
    return part if good.all() else subset(part, np.flatnonzero(good))


def shifted(progress: Progress | None, before: int, total: int) -> Progress | None:
    """``progress`` over several scans, for the one that comes after ``before`` of ``total``."""
    return progress and (lambda done, _: progress(before + done, total))


def from_checked(arrays: Mapping[str, np.ndarray], name: str, licence: str = NO_LICENCE) -> Source:
    """A source of checked arrays, in bytes.

    Args:
        arrays: ``x_train, y_train`` and so on, as :func:`keras_emr.data.checks.check_arrays` gives
            them.

    Raises:
        UserError: float images that are no multiples of 1/255.
    """
    parts = {}
    for split in ("train", "val", "test"):
        if f"x_{split}" not in arrays:
            continue
        x = arrays[f"x_{split}"]
        if x.dtype != np.uint8:
            as_bytes = np.rint(to_unit_float(x) * 255).astype(np.uint8)
            if not np.array_equal(to_unit_float(as_bytes), to_unit_float(x)):
                raise UserError(
                    f"x_{split}: images do not fit into bytes. Received: {x.dtype} values in"
                    f" {name!r} that are no multiples of 1/255. Expected uint8 images, or floats"
                    " made of them."
                )
            x = as_bytes
        labels = arrays[f"y_{split}"].astype(np.int32)
        parts[split] = scan(x.__getitem__, labels, x.shape[1:], keep=True)
    classes = int(parts["train"].labels.max()) + 1
    return Source(name, parts, tuple(map(str, range(classes))), x.shape[1:], licence)


def _each(read, chunk, bad):
    try:
        return list(read(chunk))
    except UserError:
        if bad is None:
            raise
    images = []
    for i in chunk:
        try:
            images.append(read(np.array([i]))[0])
        except UserError as error:
            bad(error, int(i))
            images.append(None)
    return images


def subset(part: Part, index: np.ndarray) -> Part:
    """Some examples of a part; images in memory are not copied."""
    read = part.read
    return Part(
        lambda chosen: read(index[chosen]),
        part.labels[index],
        part.digests[index],
        tuple(e[index] for e in part.extremes),
        part.in_memory,
    )


def to_dataset(source: Source, split_seed: int = 0, validation: float = 0.1) -> Dataset:
    """Divide a source where it is not divided yet, and make a data set of it.

    Without a test set, ``TEST_SHARE`` of the training set becomes one; without a validation set,
    the share ``validation`` of what is then left. Both are class-stratified, and images with the
    same pixels stay on the same side.

    Raises:
        UserError: too few images for that.
    """
    check_fraction("validation", validation)
    parts = dict(source.parts)
    for name, share in (("test", TEST_SHARE), ("val", validation)):
        if name not in parts:
            kept, taken = _split_groups(parts["train"], share, split_seed)
            if len(taken) == 0:
                raise UserError(
                    f"too few training images to take a {name} set from. Received:"
                    f" {len(parts['train'])} images, {len(source.class_names)} classes, share"
                    f" {share}. Give a {name} set, more images, or a larger share."
                )
            parts[name] = subset(parts["train"], taken)
            parts["train"] = subset(parts["train"], kept)
    arrays = {}
    for name in ("train", "val", "test"):
        part = parts[name]
        index = np.arange(len(part))
        images = StoredImages(part.read, index, source.image_shape, part.extremes)
        arrays[f"x_{name}"] = np.asarray(images) if part.in_memory else images
        arrays[f"y_{name}"] = part.labels.astype(np.int32)
    return Dataset(
        name=source.name,
        **arrays,
        classes=len(source.class_names),
        class_names=source.class_names,
        fingerprint=source.fingerprint,
        licence=source.licence,
        skipped=source.skipped,
    )


def _split_groups(part: Part, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """:func:`stratified_split` of the different images; copies go where the first one goes."""
    _, first, group = np.unique(part.digests, axis=0, return_index=True, return_inverse=True)
    firsts = np.sort(first)  # in the order of the part, so that without copies nothing changes
    group = first[group.reshape(-1)]
    _, taken = stratified_split(part.labels[firsts], fraction, seed)
    side = np.isin(group, firsts[taken])
    return np.flatnonzero(~side), np.flatnonzero(side)
