"""A run on disk: ``config.yaml``, ``history.jsonl``, models, checkpoint, environment, report."""

from __future__ import annotations

import json
import os
import platform
import shutil
from importlib import metadata
from pathlib import Path

from keras_emr._version import __version__
from keras_emr.errors import UserError
from keras_emr.training.checkpoints import Checkpoints
from keras_emr.training.writing import in_place_of

_FILES = (
    "config.yaml",
    "history.jsonl",
    "environment.json",
    "best.keras",
    "last.keras",
    "maximizer.keras",
    "report/training.json",
    "report/report.json",
    "report/report.html",
    "report/gallery.npz",
)
_PACKAGES = ("keras", "tensorflow", "jax", "jaxlib", "torch", "numpy", "scikit-learn")


class RunFolder:
    """Paths of a run, and how its files are written: aside first, then renamed into place.

    Args:
        path: folder; made by :meth:`prepare`.
    """

    def __init__(self, path):
        self.path = Path(path)
        self.config = self.path / "config.yaml"
        self.history = self.path / "history.jsonl"
        self.environment = self.path / "environment.json"
        self.best = self.path / "best.keras"
        self.last = self.path / "last.keras"
        self.maximizer = self.path / "maximizer.keras"
        self.checkpoints = self.path / "checkpoints"
        self.report = self.path / "report" / "training.json"
        self.baseline = self.path / "baseline"

    def check(self, resume=False, overwrite=False):
        """Raise :class:`UserError` if the folder cannot be used; changes nothing."""
        try:
            exists, used = self.path.exists(), self.path.is_dir() and any(self.path.iterdir())
        except OSError as error:
            raise self._unusable(error) from None
        if exists and not self.path.is_dir():
            raise UserError(f"out: not a folder. Received: {str(self.path)!r}.")
        if resume and not self.is_run():
            raise UserError(
                f"out: no run to resume. Received: {str(self.path)!r}. Leave --resume out to start "
                "one."
            )
        if used and not (resume or overwrite):
            raise UserError(
                f"out: the folder is not empty. Received: {str(self.path)!r}. Use --resume to go "
                "on, --overwrite to start again, or another --out."
            )
        if used and overwrite and not self.is_run():
            raise UserError(
                "out: refusing to overwrite a folder that is not a run of keras_emr. "
                f"Received: {str(self.path)!r}. Choose another --out."
            )

    def is_run(self):
        """Whether keras_emr made this folder: both files that every run starts with say so."""
        try:
            return self.config.exists() and "keras_emr" in self.read_environment()["versions"]
        except (OSError, ValueError, KeyError, TypeError):
            return False

    def prepare(self, overwrite=False):
        """Make the folder; with ``overwrite`` delete a former run's files, and only those."""
        try:
            if overwrite:
                for folder in (self.baseline, self.path):
                    for name in _FILES:
                        (folder / name).unlink(missing_ok=True)
                    Checkpoints(folder / "checkpoints").clear()
            self.checkpoints.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise self._unusable(error) from None

    def _unusable(self, error):
        return UserError(
            f"out: cannot use this folder: {error.strerror}. Received: {str(self.path)!r}. "
            "Choose another --out."
        )

    @staticmethod
    def write_text(path: Path, text: str):
        """Write ``text`` so that readers see the old file or the new one, never a part.

        Raises:
            NotWritten: as on a full disk.
        """
        with in_place_of(path) as aside:
            aside.write_text(text)

    @classmethod
    def write_json(cls, path: Path, value):
        cls.write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")

    @staticmethod
    def save_model(model, path: Path):
        """Save a model or layer; never leaves a damaged file under ``path``.

        Raises:
            NotWritten: as on a full disk.
        """
        import keras

        with in_place_of(path) as aside:
            keras.saving.save_model(model, aside)

    @staticmethod
    def copy(source: Path, path: Path):
        """Put a copy of the file ``source`` in the place of ``path``.

        Raises:
            NotWritten: as on a full disk.
        """
        with in_place_of(path) as aside:
            shutil.copyfile(source, aside)

    def has_results(self):
        """Whether a run has trained here."""
        return any(path.exists() for path in (self.history, self.best, self.last))

    def read_environment(self):
        return json.loads(self.environment.read_text())

    def read_history(self) -> list[dict]:
        """The rows of ``history.jsonl``, one per epoch; none where there is no such file."""
        lines = self.history.read_text().splitlines() if self.history.exists() else []
        return [json.loads(line) for line in lines]

    def write_history(self, rows):
        self.write_text(self.history, "".join(json.dumps(row) + "\n" for row in rows))


def describe_environment(**extra):
    """Versions and hardware, for ``environment.json``; ``extra`` adds seeds and the data's hash."""
    versions = {"keras_emr": __version__, "python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    from keras_emr import backend

    hardware = {
        "machine": platform.machine(),
        "system": platform.system(),
        "cpu_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        "devices": backend.devices(),
    }
    return {"versions": versions, "hardware": hardware, **extra}
