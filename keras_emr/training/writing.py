"""Files that are whole or not there: written aside, flushed to the disk, renamed into place."""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path

from keras_emr.errors import NotWritten


@contextlib.contextmanager
def writing(path: Path):
    """Within the block, what the system refuses is a :class:`NotWritten` that names ``path``."""
    try:
        yield
    except OSError as error:
        if isinstance(error, NotWritten):
            raise
        reason = error.strerror or str(error) or type(error).__name__
        raise NotWritten(
            f"cannot write: {reason}. Received: {str(path)!r}. What was there before is left as it "
            "was."
        ) from None


@contextlib.contextmanager
def in_place_of(path: Path):
    """A path beside ``path`` to write a file to, which takes its place when the block is done.

    Readers see the old file or the new one, never a part, and neither does who comes after a
    crash of the machine. Where the block fails, nothing of it is left.
    """
    aside = path.with_name(f".part-{path.name}")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield aside
            flush(aside)
            os.replace(aside, path)
        except BaseException:
            aside.unlink(missing_ok=True)
            raise
        flush(path.parent)


def flush(path: Path) -> None:
    """Have the disk hold what was written to a file, or which names a folder has."""
    if path.is_dir() and os.name != "posix":
        return  # folders cannot be opened
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_folder(path: Path) -> None:
    """Delete a folder; killed half-way, it has left its name already."""
    if not path.name.startswith("."):
        gone = path.with_name(f".gone-{path.name}")
        shutil.rmtree(gone, ignore_errors=True)
        path = path.replace(gone)
    shutil.rmtree(path, ignore_errors=True)
