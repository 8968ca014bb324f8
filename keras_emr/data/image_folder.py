"""Read a folder of pictures with a sub-folder for each class."""

from __future__ import annotations

import os
import re
from collections import Counter
from pathlib import Path

import numpy as np

from keras_emr.data.dataset import NO_LICENCE
from keras_emr.data.folder_listing import is_picture, list_pictures
from keras_emr.data.pictures import KINDS, BadPicture, look, read_picture
from keras_emr.data.scan_cache import key_of
from keras_emr.data.source import Part, Progress, Source, scan, shifted, subset
from keras_emr.data.stored import fits_memory
from keras_emr.errors import UserError

_LICENCES = ("license", "licence", "copying")


def parse_size(text: str | tuple[int, int] | None) -> tuple[int, int] | None:
    """``(H, W)`` of ``"32x48"``.

    Raises:
        UserError: anything else.
    """
    if text is None:
        return None
    match = re.fullmatch(r"\s*(\d+)\s*[xX]\s*(\d+)\s*", str(text))
    sides = tuple(map(int, match.groups())) if match else text
    if not (isinstance(sides, tuple) and len(sides) == 2 and all(0 < s <= 2**14 for s in sides)):
        raise UserError(
            f"image_size: bad value. Received: {text!r}. Expected HEIGHTxWIDTH in pixels, such as"
            " 32x32."
        )
    return sides


def is_image_folder(folder: Path) -> bool:
    """Whether it has sub-folders, or pictures, rather than idx files."""
    with os.scandir(folder) as entries:
        seen = [e for e in entries if not e.name.startswith(".")]
    if any(re.match(r"(train|t10k)-(images|labels)", e.name) for e in seen):
        return False
    return any(e.is_dir() or is_picture(e.name) for e in seen)


def open_image_folder(
    folder: str | Path,
    *,
    image_size: tuple[int, int] | str | None = None,
    skip_bad: bool = False,
    stream: str = "auto",
    superclasses: dict[str, tuple[str, ...]] | None = None,
    progress: Progress | None = None,
) -> Source:
    """Find, check and hash the pictures of a folder.

    Args:
        folder: ``CLASS/.../picture`` or ``train|val|test/CLASS/.../picture`` (``val`` and ``test``
            optional). Classes are numbered in the order of their names; hidden files, and files
            that are no pictures by their names, do not count.
        image_size: (H, W) or ``"HxW"``; ``None``: the size that all have.
        skip_bad: leave out what cannot be used: unreadable pictures, grey among RGB (or the other
            way round), and training copies of validation and test images.
        stream: ``auto``, ``always`` or ``never``; see :func:`keras_emr.data.stored.fits_memory`.
        superclasses: name of a class -> the folders that make it up; other folders are left out.
        progress: called with the numbers of images read and of all.

    Returns:
        The source. Grey or RGB is what most pictures are.

    Raises:
        UserError: one of the above without ``skip_bad``, several sizes and no ``image_size``, an
            empty class folder, a class that is not in the training set, fewer than two classes,
            or splits that overlap.
    """
    folder, size = Path(folder), parse_size(image_size)
    found = list_pictures(folder, superclasses)
    class_names = tuple(found["train"])
    number = {name: i for i, name in enumerate(class_names)}
    files = {
        split: [(path, number[name]) for name, paths in classes.items() for path in paths]
        for split, classes in found.items()
    }
    bad = _Bad(folder, skip_bad)
    files, shape = _same_shape(files, size, bad)
    total, seen = sum(map(len, files.values())), 0
    keep = fits_memory(total, shape, stream)
    parts = {}
    for split, listed in files.items():
        paths = [path for path, _ in listed]
        labels = np.array([label for _, label in listed], np.int32)
        on_error = (lambda error, i, paths=paths: bad(paths[i], error)) if skip_bad else None
        key = None if keep else key_of(paths, f"pictures {shape}")
        options = {"key": key, "progress": shifted(progress, seen, total)}
        parts[split] = scan(_reader(paths, shape), labels, shape, keep, on_error, **options)
        seen += len(paths)
        missing = set(range(len(class_names))) - set(parts[split].labels.tolist())
        if split == "train" and missing:
            raise UserError(
                f"class folder is empty once bad images are left out. Received:"
                f" {class_names[min(missing)]!r} in {str(folder)!r}. Repair its images, or remove"
                " the folder."
            )
        files[split] = bad.without(paths)
    _separate(parts, files, bad)
    return Source(folder.name, parts, class_names, shape, _licence(folder), tuple(bad.lines))


class _Bad:
    """Raises for an image that cannot be used, or notes it down."""

    def __init__(self, folder: Path, skip: bool):
        self.folder, self.skip, self.lines, self.paths = folder, skip, [], set()

    def __call__(self, path: Path, error: UserError) -> None:
        if not self.skip:
            raise error
        self.paths.add(path)
        self.lines.append(f"{path.relative_to(self.folder)}: {str(error).split(' Received:')[0]}")

    def without(self, paths):
        return [path for path in paths if path not in self.paths]


def _same_shape(files, size, bad: _Bad):
    """The files with those of the other kind left out, and the (H, W, C) of all images."""
    headers = {}
    for listed in files.values():
        for path, _ in listed:
            try:
                headers[path] = look(path)
            except BadPicture as error:
                bad(path, error)
    if not headers:
        raise UserError(
            f"no usable image. Received: {str(bad.folder)!r}, where all {len(bad.paths)} are bad."
            " Expected images that Pillow can read."
        )
    kinds = Counter(header[2] for header in headers.values())
    channels = 3 if kinds[3] >= kinds[1] else 1
    other = 4 - channels
    for path, header in headers.items():
        if header[2] == other:
            bad(
                path,
                BadPicture(
                    f"{KINDS[other]} image among {kinds[channels]} {KINDS[channels]} images."
                    f" Received: {str(path)!r} ({kinds[other]} such). Convert it, or leave out"
                    " such images with --skip-bad."
                ),
            )
    kept = {
        split: [(path, label) for path, label in listed if path not in bad.paths]
        for split, listed in files.items()
    }
    for split, listed in kept.items():
        if not listed:
            raise UserError(
                f"no usable image in {split}. Received: {str(bad.folder)!r}. Repair its images."
            )
    if size is None:
        sizes = Counter(headers[path][:2] for listed in kept.values() for path, _ in listed)
        if len(sizes) > 1:
            shown = ", ".join(f"{h}x{w}" for (h, w), _ in sizes.most_common(3))
            (height, width), _ = sizes.most_common(1)[0]
            raise UserError(
                f"images differ in size. Received: {len(sizes)} sizes ({shown}"
                f"{', ...' if len(sizes) > 3 else ''}) in {str(bad.folder)!r}. Expected one size,"
                f" or --image-size HxW to resize to, such as --image-size {height}x{width}."
            )
        (size,) = sizes
    return kept, (*size, channels)


def _reader(paths: list[Path], shape):
    def read(index):
        return np.stack([read_picture(paths[i], shape) for i in index])

    return read


def _separate(parts: dict[str, Part], files, bad: _Bad) -> None:
    """No image may stand in two splits; test comes before validation before training."""
    seen: dict[bytes, Path] = {}
    for split in ("test", "val", "train"):
        if split not in parts:
            continue
        part, own = parts[split], {}
        copies = []
        for i, digest in enumerate(map(bytes, part.digests)):
            path = files[split][i]
            if digest in seen:
                copies.append(i)
                bad(
                    path,
                    UserError(
                        f"splits overlap: the same image in {split} and elsewhere. Received:"
                        f" {str(path)!r} and {str(seen[digest])!r}. Remove one of the two, or leave"
                        " out such images with --skip-bad."
                    ),
                )
            else:
                own.setdefault(digest, path)
        if copies:
            parts[split] = subset(part, np.delete(np.arange(len(part)), copies))
            if split == "train" or not len(parts[split]):
                _require_classes(parts[split], part, split, bad)
        seen |= own


def _require_classes(part: Part, before: Part, split: str, bad: _Bad) -> None:
    if set(part.labels.tolist()) != set(before.labels.tolist()):
        raise UserError(
            f"splits overlap: a class of {split} has no image of its own. Received:"
            f" {str(bad.folder)!r}. Expected different images in every split."
        )


def _licence(folder: Path) -> str:
    for path in sorted(folder.iterdir()):
        if path.is_file() and path.stem.lower() in _LICENCES:
            return f"see {path.name} in the folder"
    return NO_LICENCE
