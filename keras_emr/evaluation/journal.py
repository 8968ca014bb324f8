"""The state file of a long evaluation: a killed one goes on where it stopped."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from pathlib import Path
from zipfile import BadZipFile

import keras
import numpy as np

from keras_emr._version import __version__
from keras_emr.errors import UserError

# Seconds between two writes; more where writing takes long.
_EVERY = 10.0


class Journal:
    """Writes what an evaluation has found, whole or not at all, and reads it again.

    Args:
        path: of the file, or ``None``: nothing is written.
        target: what is attacked; its fingerprint must not change.
        x, y: checked images and labels.
        settings: everything else that decides the result, as plain values.

    Raises:
        UserError: the file cannot be read or belongs to another evaluation.
    """

    def __init__(self, path, target, x, y, settings):
        self.path = None if path is None else Path(path)
        self._run = None
        self._wrote, self._took = time.monotonic(), 0.0
        if self.path is None:
            return
        data = hashlib.sha256(np.ascontiguousarray(x))
        data.update(np.ascontiguousarray(y))
        self.identity = json.loads(
            json.dumps(
                {
                    "model": target.fingerprint(),
                    "n": len(x),
                    "data": data.hexdigest(),
                    "backend": keras.backend.backend(),
                    "keras_emr": __version__,
                    **settings,
                }
            )
        )
        self._stored = self._read() if self.path.exists() else None

    def _read(self):
        try:
            with np.load(self.path, allow_pickle=False) as file:
                stored = {name: file[name] for name in file.files}
            stored["meta"] = json.loads(str(stored["meta"]))
            identity = stored["meta"]["identity"]
        except (OSError, ValueError, KeyError, TypeError, EOFError, BadZipFile) as error:
            raise UserError(
                f"state: cannot be read ({type(error).__name__}). Received: {str(self.path)!r}. "
                "Expected a state file of keras_emr; to start anew, remove it."
            ) from None
        for name, value in self.identity.items():
            if identity.get(name) != value:
                name, stored_value, value = _difference(name, identity.get(name), value)
                raise UserError(
                    f"state: of another evaluation, {name} differs. Received: "
                    f"{_short(stored_value)} in {str(self.path)!r}. Expected "
                    f"{_short(value)}; to start anew, remove the file (keras-emr evaluate --fresh)."
                )
        return stored

    def restore(self, run):
        """Give ``run`` what the file holds."""
        if self.path is None or self._stored is None:
            return
        meta = self._stored["meta"]
        if not np.array_equal(run.correct, self._stored["correct"]):
            raise UserError(
                "state: the model answers otherwise than when it was written. Received: "
                f"{int((run.correct != self._stored['correct']).sum())} other clean predictions "
                f"for {str(self.path)!r}. Expected the same model; to start anew, remove the file "
                "(keras-emr evaluate --fresh)."
            )
        run.robust = self._stored["robust"]
        run.broken_by = self._stored["broken_by"]
        run.x_adv[self._stored["broken"]] = self._stored["images"]
        run.finished, run.position, run.spent = meta["finished"], meta["position"], meta["spent"]

    def __enter__(self):
        return self

    def __exit__(self, *error):
        # However it ended, what was found is kept.
        if self._run is not None:
            self._write()

    def save(self, run, now=False):
        """Write, unless the last write was moments ago."""
        self._run = run
        wait = max(_EVERY, 20 * self._took)
        if self.path is not None and (now or time.monotonic() - self._wrote >= wait):
            self._write()

    def _write(self):
        if self.path is None:
            return
        began = time.monotonic()
        run = self._run
        broken = np.flatnonzero(run.broken_by >= 0)
        meta = {
            "identity": self.identity,
            "finished": run.finished,
            "position": run.position,
            "spent": run.spent,
        }
        aside = self.path.with_name(self.path.name + ".tmp")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with aside.open("wb") as file:
                np.savez(
                    file,
                    meta=np.array(json.dumps(meta)),
                    robust=run.robust,
                    correct=run.correct,
                    broken_by=run.broken_by,
                    broken=broken,
                    images=run.x_adv[broken],
                )
                file.flush()
                os.fsync(file.fileno())
            os.replace(aside, self.path)
        except OSError as error:
            self._run = None
            with contextlib.suppress(OSError):
                aside.unlink(missing_ok=True)
            raise UserError(
                f"state: cannot be written ({error.strerror}). Received: {str(self.path)!r}. What "
                "was written before is intact; make room and go on."
            ) from None
        self._wrote = time.monotonic()
        self._took = self._wrote - began


def _difference(name, stored, given):
    """Where two values differ, as deep inside as can be named: ``(name, stored, given)``."""
    if isinstance(stored, dict) and isinstance(given, dict):
        for key in [*given, *stored]:
            if stored.get(key) != given.get(key):
                return _difference(f"{name}.{key}", stored.get(key), given.get(key))
    if isinstance(stored, list) and isinstance(given, list) and len(stored) == len(given):
        for i, (one, other) in enumerate(zip(stored, given, strict=True)):
            if one != other:
                return _difference(f"{name}[{i}]", one, other)
    return name, stored, given


def _short(value):
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 40 else f"{text[:12]}..." if " " not in text else f"{text[:160]}..."
