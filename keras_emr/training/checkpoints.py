"""Checkpoints on disk: written aside, checksummed, renamed into place, the one before it kept."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from keras_emr.errors import UserError
from keras_emr.training.writing import flush, remove_folder, writing

FORMAT = 1
_ARRAYS, _STATE, _MANIFEST = "arrays.npz", "state.json", "manifest.json"
_NAME = re.compile(r"epoch-(\d{5,})-step-(\d{7,})")
_ASIDE, _GONE = ".part-", ".gone-"
_RETRY = "Train anew with --overwrite, or in another folder."


@dataclass(frozen=True, order=True)
class Position:
    """Where training stands: ``step`` steps of epoch ``epoch`` (from 0) are done.

    ``Position(e, n)`` of n steps in all: the epoch's validation is still to come. Epoch -1 is the
    maximizer's warm-up, in batches.
    """

    epoch: int
    step: int

    def __str__(self):
        where = "the maximizer's warm-up" if self.epoch < 0 else f"epoch {self.epoch + 1}"
        return f"{where}, step {self.step}"

    @property
    def name(self):
        """The folder's name; in the order of training."""
        return f"epoch-{self.epoch + 1:05d}-step-{self.step:07d}"


@dataclass(frozen=True)
class Checkpoint:
    """What was read: where it stands, the arrays by name, all else as JSON has it."""

    position: Position
    arrays: Mapping[str, np.ndarray]
    state: Mapping


class _Damaged(Exception):
    """Why a checkpoint cannot be used."""


def warn(text: str) -> None:
    """One line on stderr."""
    print(f"Warning: {text}", file=sys.stderr, flush=True)


class Checkpoints:
    """The folder ``checkpoints/`` of a run.

    A checkpoint is a folder of ``arrays.npz``, ``state.json`` and ``manifest.json``, which has the
    format's version and each file's length and SHA-256. Nothing in it is code, and loading runs
    none.

    Args:
        folder: path; made when something is saved.
        notify: is told of every damaged checkpoint, one line each.
    """

    def __init__(self, folder: Path, notify: Callable[[str], None] = warn):
        self.folder, self.notify = Path(folder), notify
        self._latest: str | None = None  # of those known to be whole

    def save(self, position: Position, arrays: Mapping[str, np.ndarray], state: Mapping) -> Path:
        """Write a checkpoint; then remove all but it and the last one known to be whole.

        Killed at any moment, this leaves the one before as it was.

        Args:
            position: where training stands; a damaged checkpoint of the same place is replaced.
            arrays: NumPy arrays of types that NumPy itself has, by name.
            state: what JSON can hold.

        Raises:
            NotWritten: as on a full disk; the checkpoints that were there are untouched.
        """
        target, aside = self.folder / position.name, self.folder / (_ASIDE + position.name)
        if target.name == self._latest:  # training is a function of where it stands
            return target
        with writing(target):
            self._sweep()
            aside.mkdir(parents=True)
            try:
                with open(aside / _ARRAYS, "wb") as file:
                    np.savez(file, **arrays)
                (aside / _STATE).write_text(
                    json.dumps({"epoch": position.epoch, "step": position.step, **state}) + "\n"
                )
                (aside / _MANIFEST).write_text(_manifest(aside))
                for name in (_ARRAYS, _STATE, _MANIFEST):
                    flush(aside / name)
                flush(aside)
                if target.exists():  # damaged, or it would be the latest
                    remove_folder(target)
                os.replace(aside, target)
            except Exception:
                shutil.rmtree(aside, ignore_errors=True)
                raise
            flush(self.folder)
        kept = {self._latest, target.name}
        self._latest = target.name
        for name in self._names():
            if name not in kept:
                remove_folder(self.folder / name)
        return target

    def newest(self, identity: Mapping) -> Checkpoint | None:
        """The newest whole checkpoint; ``None`` where there is none at all.

        Args:
            identity: what is about to be trained, nested as JSON has it; it must be what was
                saved as ``state["identity"]``.

        Raises:
            UserError: every checkpoint is damaged; the newest is another model's, or of a later
                version.
        """
        names = sorted(self._names(), key=_place, reverse=True)
        for i, name in enumerate(names):
            path = self.folder / name
            try:
                found = self._read(path)
            except _Damaged as damage:
                if i + 1 == len(names):
                    raise UserError(
                        f"no checkpoint can be used: {damage}. Received: {str(path)!r}"
                        f"{f' and {i} newer, damaged as well' if i else ''}. {_RETRY}"
                    ) from None
                self.notify(
                    f"checkpoint skipped: {damage}. Received: {str(path)!r}. The one before it, "
                    f"{names[i + 1]}, is tried."
                )
                continue
            _require_same(found.state["identity"], identity, path)
            self._latest = name
            return found
        return None

    def clear(self) -> None:
        """Remove every checkpoint, and what killed processes left of some."""
        self._sweep()
        for name in self._names():
            remove_folder(self.folder / name)
        self._latest = None

    def _names(self):
        if not self.folder.is_dir():
            return []
        return [path.name for path in self.folder.iterdir() if _NAME.fullmatch(path.name)]

    def _sweep(self):
        if self.folder.is_dir():
            for path in self.folder.iterdir():
                if path.name.startswith((_ASIDE, _GONE)):
                    remove_folder(path)

    @staticmethod
    def _read(path):
        manifest = _checked_manifest(path)
        if manifest["format"] > FORMAT:
            raise UserError(
                "the checkpoint is of a later version of keras_emr. Received: "
                f"{str(path)!r}, format {manifest['format']}. Expected format {FORMAT} at most. "
                "Upgrade keras_emr."
            )
        for name in (_ARRAYS, _STATE):
            _check_file(path / name, manifest["files"][name])
        state = json.loads((path / _STATE).read_text())
        with np.load(path / _ARRAYS, allow_pickle=False) as stored:
            arrays = {name: stored[name] for name in stored.files}
        return Checkpoint(Position(state["epoch"], state["step"]), arrays, state)


def _place(name):
    return tuple(map(int, _NAME.fullmatch(name).groups()))


def _sha256(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _seal(manifest):
    """SHA-256 of the manifest itself, of what it says and not of how it is written."""
    said = json.dumps({k: v for k, v in manifest.items() if k != "sha256"}, sort_keys=True)
    return hashlib.sha256(said.encode()).hexdigest()


def _manifest(folder):
    files = {
        name: {"bytes": (folder / name).stat().st_size, "sha256": _sha256(folder / name)}
        for name in (_ARRAYS, _STATE)
    }
    manifest = {"format": FORMAT, "files": files}
    return json.dumps({**manifest, "sha256": _seal(manifest)}, indent=2)


def _checked_manifest(path):
    try:
        manifest = json.loads((path / _MANIFEST).read_text())
    except OSError as error:
        raise _Damaged(f"{_MANIFEST} cannot be read: {error.strerror}") from None
    except ValueError:
        manifest = None
    if not isinstance(manifest, dict) or manifest.get("sha256") != _seal(manifest):
        raise _Damaged(f"{_MANIFEST} is not what was written")
    return manifest


def _check_file(path, expected):
    try:
        size, found = path.stat().st_size, _sha256(path)
    except OSError as error:
        raise _Damaged(f"{path.name} cannot be read: {error.strerror}") from None
    if size != expected["bytes"]:
        raise _Damaged(f"{path.name} has {size} bytes of {expected['bytes']}")
    if found != expected["sha256"]:
        raise _Damaged(f"{path.name} is not what was written (SHA-256)")


def _require_same(had, now, path):
    different = _difference((), had, now)
    if different is not None:
        field, theirs, ours = different
        raise UserError(
            f"the checkpoint is of another {field}. Received: {_short(ours)}, while {str(path)!r} "
            f"has {_short(theirs)}. Continue with what the run began with, or train anew in "
            "another folder."
        )


def _difference(place, one, other):
    """The first place where two JSON values differ, with both; ``None`` if they do not."""
    if isinstance(one, dict) and isinstance(other, dict):
        keys = [*other, *(key for key in one if key not in other)]
        for key in sorted(keys, key=lambda key: key != "class_name"):  # what it is, then how
            found = _difference((*place, key), one.get(key), other.get(key))
            if found is not None:
                return found
        return None
    # Keras's words for the nesting of options say nothing to a user.
    field = " ".join(word for word in place if word not in ("config", "class_name"))
    return None if one == other else (field, one, other)


def _short(value):
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 120 else f"{text[:110]}..."
