"""Reports on disk: ``report.json``, ``report.html`` and the gallery's images."""

from __future__ import annotations

import io
import json
import os
import shutil
import zipfile
from pathlib import Path

import numpy as np

from keras_emr.errors import UserError
from keras_emr.reports.schema import validate

JSON, PAGE, IMAGES = "report.json", "report.html", "gallery.npz"


def find_report(path):
    """Path of the ``report.json`` that ``path`` means.

    Args:
        path: a run, the folder of a report, or a ``report.json``.

    Raises:
        UserError: there is none.
    """
    path = Path(path)
    try:
        if path.is_file():
            return path
        for candidate in (path / "report" / JSON, path / JSON):
            if candidate.is_file():
                return candidate
    except OSError as error:
        raise _unreadable(path, error.strerror) from None
    fix = f"Make one with: keras-emr evaluate {path}" if path.is_dir() else "Expected a run"
    raise UserError(f"report: not found. Received: {str(path)!r}. {fix}.")


def read_report(path):
    """Read and validate a report.

    Args:
        path: as for :func:`find_report`.

    Returns:
        The report, a dictionary.

    Raises:
        UserError: not found, not readable, not a report, or one of a newer keras_emr.
    """
    path = find_report(path)
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise _unreadable(path, error.strerror) from None
    except (ValueError, RecursionError):
        raise _unreadable(path, "it is not JSON") from None
    try:
        validate(report)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    return report


def read_images(path):
    """The gallery's images beside a report.

    Args:
        path: as for :func:`find_report`.

    Returns:
        List of ``{"index", "clean", "adversarial"}``, images (H, W, C) in [0, 1]; empty if none
        were kept.
    """
    file = find_report(path).with_name(IMAGES)
    if not file.exists():
        return []
    try:
        with np.load(file, allow_pickle=False) as kept:
            index, clean, adversarial = kept["index"], kept["clean"], kept["adversarial"]
            rows = zip(index.tolist(), clean, adversarial, strict=True)
            return _checked([{"index": i, "clean": c, "adversarial": a} for i, c, a in rows])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, zipfile.BadZipFile):
        raise _unreadable(file, "damaged") from None


def write_report(folder, report, images=()):
    """Write a report that stays whole: all files aside first, then renamed into place.

    Args:
        folder: where; made if need be. ``report.json``, ``report.html`` and ``gallery.npz`` in it
            are replaced.
        report: dictionary, see ``schema.json``.
        images: for the gallery, ``{"index", "clean", "adversarial"}`` each: index as in
            ``report["gallery"]``, images (H, W, C) in [0, 1].

    Returns:
        Path of ``report.json``.

    Raises:
        UserError: the report is not valid, or cannot be written, for example because the disk is
            full; what was there before is then as it was.
    """
    from keras_emr.reports.page import page

    validate(report)
    images = _checked(images)
    files = {
        PAGE: page([report], [images]).encode(errors="replace"),
        IMAGES: _packed(images),
        JSON: (json.dumps(report, indent=2, allow_nan=False) + "\n").encode(),
    }
    write_files(folder, files)
    return Path(folder) / JSON


def write_files(folder, files):
    """Replace files in ``folder``: all of them, or none if anything fails.

    Args:
        folder: where; made if need be.
        files: name -> bytes; ``None`` removes the file.

    Raises:
        UserError: the system refuses.
    """
    folder = Path(folder)
    aside = {name: folder / f".{name}.part" for name in files}
    before = {name: folder / f".{name}.old" for name in files}
    begun = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            if content is not None:
                _write(aside[name], content)
            if (folder / name).exists():
                shutil.copy2(folder / name, before[name])
        for name, content in files.items():
            begun.append(name)
            if content is None:
                (folder / name).unlink(missing_ok=True)
            else:
                os.replace(aside[name], folder / name)
    except BaseException as error:
        for name in begun:
            if before[name].exists():
                os.replace(before[name], folder / name)
            elif name != begun[-1]:
                (folder / name).unlink(missing_ok=True)
        if not isinstance(error, OSError):
            raise
        raise UserError(
            f"report: cannot write it: {error.strerror or error}. Received: {str(folder)!r}. "
            "Expected a folder that can be written to, with room."
        ) from None
    finally:
        for left in (*aside.values(), *before.values()):
            _remove(left)


def _write(path, content):
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _remove(path):
    try:
        path.unlink(missing_ok=True)
    except OSError:
        pass  # it is one of ours, aside; the error that counts is under way


def _packed(images):
    if not images:
        return None
    stacked = {
        "index": np.array([image["index"] for image in images]),
        "clean": np.stack([image["clean"] for image in images]),
        "adversarial": np.stack([image["adversarial"] for image in images]),
    }
    file = io.BytesIO()
    np.savez_compressed(file, **stacked)
    return file.getvalue()


def _checked(images):
    """The images as float32, all of one shape (H, W, C), finite and in [0, 1]."""
    checked = []
    for image in images:
        pair = {name: np.asarray(image[name], "float32") for name in ("clean", "adversarial")}
        for array in pair.values():
            shape = (checked[0] if checked else pair)["clean"].shape
            if array.ndim != 3 or array.shape != shape or not array.size:
                raise UserError(
                    f"report: gallery image {image['index']}. Received: shape {array.shape}. "
                    "Expected (H, W, C), the same for all."
                )
            if not (np.isfinite(array).all() and array.min() >= 0 and array.max() <= 1):
                raise UserError(
                    f"report: gallery image {image['index']}. Received: values from {array.min()} "
                    f"to {array.max()}. Expected [0, 1]."
                )
        checked.append({"index": int(image["index"]), **pair})
    return checked


def _unreadable(path, reason):
    return UserError(
        f"report: cannot read it: {reason}. Received: {str(path)!r}. Expected what keras-emr "
        "evaluate writes."
    )
