"""What a look at every image of a large source has found, kept for the next start."""

from __future__ import annotations

import contextlib
import hashlib
import os
import uuid
from collections.abc import Iterable
from pathlib import Path

import numpy as np

_FORMAT = "keras_emr scan 1"


def cache_folder() -> Path:
    """``$XDG_CACHE_HOME/keras_emr/scans``, or ``~/.cache/keras_emr/scans``; safe to delete."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.path.expanduser(base)) / "keras_emr" / "scans"


def key_of(files: Iterable[Path], what: str) -> str:
    """A name for the images of ``files``: it changes with a file's path, size or time of change.

    Args:
        files: in the order of their images.
        what: all else that the images depend on, such as the size they are read in.
    """
    digest = hashlib.sha256(f"{_FORMAT}\n{what}\n".encode())
    for path in files:
        found = os.stat(path)
        line = f"{os.path.abspath(path)}\0{found.st_size}\0{found.st_mtime_ns}\n"
        digest.update(os.fsencode(line))
    return digest.hexdigest()


def recall(key: str, arrays: dict[str, np.ndarray]) -> bool:
    """Fill ``arrays`` with what was kept under ``key``; ``False`` where there is nothing usable."""
    try:
        with np.load(cache_folder() / f"{key}.npz", allow_pickle=False) as kept:
            found = {name: kept[name] for name in arrays}
    except Exception:  # none, or damaged in any way: the images are read again
        return False
    if any(found[n].shape != a.shape or found[n].dtype != a.dtype for n, a in arrays.items()):
        return False
    for name, array in arrays.items():
        array[...] = found[name]
    return True


def keep(key: str, arrays: dict[str, np.ndarray]) -> None:
    """Keep ``arrays`` under ``key``. It is only a cache: where it cannot be written it is not."""
    folder = cache_folder()
    aside = folder / f".{key}-{uuid.uuid4().hex}.npz"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        np.savez(aside, **arrays)
        os.replace(aside, folder / f"{key}.npz")
    except OSError:
        with contextlib.suppress(OSError):
            aside.unlink(missing_ok=True)
