"""Find the pictures of a folder: which split and which class each belongs to, by its path."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from keras_emr.data.pictures import SUFFIXES
from keras_emr.errors import UserError

# The names under which a split's folder is known; the first is ours.
SPLITS = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation"),
    "test": ("test", "testing"),
}


def list_pictures(
    folder: Path, superclasses: Mapping[str, Sequence[str]] | None = None
) -> dict[str, dict[str, list[Path]]]:
    """Split -> class -> its pictures, sorted; only paths are looked at.

    Args:
        folder: ``CLASS/.../picture`` (all of it is ``train``) or ``SPLIT/CLASS/.../picture``.
        superclasses: name of a class -> the folders that make it up; other folders are left out.

    Raises:
        UserError: splits that are not clear, no class folders, an empty one, a class that the
            training set lacks, or fewer than two classes.
    """
    found = {name: _classes(path, superclasses) for name, path in _split_folders(folder).items()}
    _check_classes(found, folder)
    return found


def class_folders(folder: Path) -> list[str]:
    """The names of the class folders of the training set.

    Raises:
        UserError: splits that are not clear.
    """
    return [path.name for path in _folders(_split_folders(folder)["train"])]


def is_picture(name: str) -> bool:
    """Whether a file is a picture by its name."""
    return os.path.splitext(name)[1].lower() in SUFFIXES


def _folders(path: Path) -> list[Path]:
    return sorted(p for p in path.iterdir() if p.is_dir() and not p.name.startswith("."))


def _split_folders(folder: Path) -> dict[str, Path]:
    """The folder of each split; a folder without splits is all training set."""
    inside = {path.name.lower(): path for path in _folders(folder)}
    known = {known for names in SPLITS.values() for known in names}
    if not set(inside) & known:
        return {"train": folder}
    strangers = sorted(set(inside) - known)
    found = {}
    for split, names in SPLITS.items():
        there = [inside[name] for name in names if name in inside]
        if len(there) > 1:
            raise UserError(
                f"two folders for one split. Received: {there[0].name!r} and {there[1].name!r} in"
                f" {str(folder)!r}. Expected one of them."
            )
        if there:
            found[split] = there[0]
    if strangers or "train" not in found:
        raise UserError(
            f"image folder: splits are not clear. Received: {', '.join(sorted(inside))} in"
            f" {str(folder)!r}. Expected train (and val, test) and nothing else, or a folder for"
            " each class."
        )
    return found


def _classes(path: Path, superclasses) -> dict[str, list[Path]]:
    """Class name -> its pictures, sorted."""
    folders = _folders(path)
    if not folders:
        raise UserError(
            f"image folder without class folders. Received: {str(path)!r}. Expected a sub-folder"
            " of images for each class."
        )
    if superclasses is not None:
        return _merged(path, folders, superclasses)
    return {folder.name: _pictures(folder) for folder in folders}


def _merged(path, folders, superclasses):
    there = {folder.name for folder in folders}
    classes = {}
    for name, members in superclasses.items():
        absent = [member for member in members if member not in there]
        if absent:
            raise UserError(
                f"class folders are missing. Received: {len(absent)} of {len(members)} of"
                f" {name!r}, {absent[0]} among them, in {str(path)!r}. Expected all of them."
            )
        classes[name] = [p for member in members for p in _pictures(path / member)]
    return classes


def _pictures(folder: Path) -> list[Path]:
    found = []
    for where, inside, names in os.walk(folder, followlinks=True):
        inside[:] = sorted(name for name in inside if not name.startswith("."))
        pictures = (n for n in names if is_picture(n) and not n.startswith("."))
        found += [Path(where) / name for name in sorted(pictures)]
    if not found:
        raise UserError(
            f"class folder is empty. Received: no picture in {str(folder)!r}. Expected files"
            f" ending in {', '.join(sorted(SUFFIXES))}: add some, or remove the folder."
        )
    return found


def _check_classes(found, folder: Path) -> None:
    names = list(found["train"])
    for split, classes in found.items():
        unknown = sorted(set(classes) - set(names))
        if unknown:
            raise UserError(
                f"class without training images. Received: {unknown[0]!r} in {split}, not in train,"
                f" of {str(folder)!r}. Expected the same class folders in every split."
            )
    if len(names) < 2:
        raise UserError(
            f"image folder with a single class. Received: only {names[0]!r} in {str(folder)!r}."
            " Expected a folder for each of at least two classes."
        )
