"""A model store, ``STORE/NAME/VERSION``: which versions there are, and how a new one appears.

TensorFlow Serving polls the folder of a model and loads whatever has a whole number for a name. A
version is therefore built under a name that is none, and renamed when it is complete.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import uuid
from pathlib import Path

from keras_emr.errors import UserError

AUTO = "auto"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_PARTIAL = ".partial-"
_ATTEMPTS = 5
_LARGEST = 2**63 - 1  # TensorFlow Serving's versions are int64


def check_name(name):
    """``name`` if servers can take it for a model's, else :class:`UserError`."""
    if not _NAME.fullmatch(name) or name.isdigit() or len(name) > 200:
        raise UserError(
            f"--name: not a name of a model. Received: {name!r}. Expected letters, digits, '.', "
            "'_' and '-', no '/', and not digits alone."
        )
    return name


def check_version(version):
    """``"auto"`` or an int from ``"auto"``, an int or digits, else :class:`UserError`."""
    text = str(version)
    if text == AUTO:
        return AUTO
    if not (text.isascii() and text.isdigit() and 1 <= int(text) <= _LARGEST):
        raise UserError(
            f"--version: bad value. Received: {text!r}. Expected auto or a whole number from 1."
        )
    return int(text)


def versions(folder):
    """The version numbers in the folder of a model, ascending; empty if there is none."""
    try:
        names = os.listdir(folder)
    except (FileNotFoundError, NotADirectoryError):
        return []
    return sorted(int(name) for name in names if name.isascii() and name.isdigit())


class ModelFolder:
    """``STORE/NAME``, to which versions are published.

    Args:
        store: folder of models; made if need be.
        name: of the model.

    Raises:
        UserError: the name cannot be one, or the store is a file or the folder of a model.
    """

    def __init__(self, store, name):
        self.store, self.name = Path(store), check_name(name)
        self.path = self.store / name
        for folder, what in ((self.store, "not a folder"), (self.path, "a file is in the way")):
            if os.path.lexists(folder) and not folder.is_dir():
                raise UserError(
                    f"--to: {what}. Received: {str(folder)!r}. Expected a folder of models."
                )
        if _is_saved_model(self.store) or any(
            _is_saved_model(self.store / str(n)) for n in versions(self.store)
        ):
            raise UserError(
                f"--to: this is the folder of one model. Received: {str(self.store)!r}. Expected "
                f"the folder above it, and --name {self.store.name}."
            )
        if _is_saved_model(self.path) or (self.path / "config.yaml").exists():
            raise UserError(
                f"--to: not the folder of a model's versions. Received: {str(self.path)!r}. Give "
                "another --name or --to."
            )

    def require_free(self, version):
        """Raise :class:`UserError` if ``version`` exists; ``"auto"`` never does."""
        if version != AUTO and version in versions(self.path):
            raise UserError(
                f"--version: it exists. Received: {version} in {str(self.path)!r}, which has "
                f"{', '.join(map(str, versions(self.path)))}. Expected another number, or auto."
            )

    @contextlib.contextmanager
    def staging(self):
        """A new folder in this one that no server loads; gone after the block, whatever happens.

        What earlier exports left that were killed is removed; those still at work are let be.

        Raises:
            UserError: the store cannot be written to.
        """
        made = [p for p in (self.path, *self.path.parents) if not p.exists()]
        folder = self.path / f"{_PARTIAL}{uuid.uuid4().hex[:12]}"
        held = None
        try:
            try:
                held = self._begun(folder)
            except OSError as error:
                raise self.refused(error) from None
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            if held is not None:
                os.close(held)
            for path in made:  # only where nothing else has come into them
                with contextlib.suppress(OSError):
                    path.rmdir()

    def publish(self, folder, version):
        """Rename ``folder`` to a version, after all of it has reached the disk: its number.

        Args:
            folder: complete version, in this folder's file system.
            version: an int, or ``"auto"`` for the highest so far + 1.

        Raises:
            UserError: the version exists by now, or the system refuses.
        """
        try:
            _sync(folder)
            with self._locked():
                self.require_free(version)
                present = versions(self.path)
                number = present[-1] + 1 if present and version == AUTO else version
                number = 1 if number == AUTO else number
                if number > _LARGEST:
                    raise UserError(
                        f"--version: no number is left above {present[-1]}. Received: auto. "
                        "Expected a free number."
                    )
                # Not onto an empty folder either, which rename() would replace.
                os.rename(folder, self.path / str(number))
                _sync_folder(self.path)
        except OSError as error:
            raise self.refused(error) from None
        return number

    def _begun(self, folder):
        for attempt in range(_ATTEMPTS):
            try:
                self.path.mkdir(parents=True, exist_ok=True)
                with self._locked():
                    self._sweep()
                    folder.mkdir()
                    return _hold(folder)
            except FileNotFoundError:  # a failed export has just removed what it had made
                if attempt == _ATTEMPTS - 1:
                    raise

    @contextlib.contextmanager
    def _locked(self):
        descriptor = os.open(self.path, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)

    def _sweep(self):
        for left in self.path.glob(f"{_PARTIAL}*"):
            held = _hold(left)
            if held is not None:  # its export is no more: the system let go of its lock
                shutil.rmtree(left, ignore_errors=True)
                os.close(held)

    def refused(self, error):
        return UserError(
            f"--to: cannot write there: {error.strerror or error}. Received: {str(self.path)!r}. "
            "Expected a folder that can be written to, with room."
        )


def _is_saved_model(folder):
    return (folder / "saved_model.pb").exists()


def _hold(folder):
    """A descriptor that locks ``folder`` while it is open; ``None`` if another has it."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def _sync(folder):
    for where, _, files in os.walk(folder):
        for name in files:
            with open(os.path.join(where, name), "rb") as file:
                os.fsync(file.fileno())
        _sync_folder(where)


def _sync_folder(folder):
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
