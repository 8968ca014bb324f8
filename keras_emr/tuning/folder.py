"""A search on disk."""

from __future__ import annotations

import json
import os
import shutil
import uuid
from pathlib import Path

from keras_emr._version import __version__
from keras_emr.errors import UserError
from keras_emr.training.run_folder import RunFolder
from keras_emr.tuning.trials import read_result

_FILES = ("search.json", "config.yaml", "space.yaml", "state.json", "environment.json")
_RESULTS = ("results.json", "results.csv", "pareto.png")
_FOLDERS = ("trials", "errors", "logs")


class SearchFolder:
    """Paths of a search: its settings, its state, a run folder per trial, its results.

    Args:
        path: folder; made by :meth:`prepare`.
    """

    def __init__(self, path):
        self.path = Path(path)
        self.about, self.config, self.space, self.state, self.environment = (
            self.path / name for name in _FILES
        )
        self.results, self.csv, self.plot = (self.path / name for name in _RESULTS)
        self.trials, self.errors, self.logs = (self.path / name for name in _FOLDERS)

    def check(self, resume=False, overwrite=False):
        """Raise :class:`UserError` if the folder cannot be used; changes nothing."""
        try:
            used = self.path.exists() and any(self.path.iterdir())
        except NotADirectoryError:
            raise UserError(f"out: not a folder. Received: {str(self.path)!r}.") from None
        except OSError as error:
            raise self._unusable(error) from None
        if resume and not self.is_search():
            raise UserError(
                f"out: no search to resume. Received: {str(self.path)!r}. Leave --resume out to "
                "start one."
            )
        if used and not (resume or overwrite):
            raise UserError(
                f"out: the folder is not empty. Received: {str(self.path)!r}. Use --resume to go "
                "on, --overwrite to start again, or another --out."
            )
        if used and overwrite and not self.is_search():
            raise UserError(
                "out: refusing to overwrite a folder that is not a search of keras_emr. "
                f"Received: {str(self.path)!r}. Choose another --out."
            )

    def is_search(self):
        """Whether keras_emr made this folder."""
        try:
            return "keras_emr" in json.loads(self.about.read_text())
        except (OSError, ValueError, TypeError):
            return False

    def prepare(self, overwrite=False):
        """Make the folder and name the search; with ``overwrite`` a former one's files go."""
        try:
            if overwrite:
                for name in (*_FILES, *_RESULTS):
                    (self.path / name).unlink(missing_ok=True)
                for name in _FOLDERS:
                    shutil.rmtree(self.path / name, ignore_errors=True)
            for folder in (self.trials, self.errors, self.logs):
                folder.mkdir(parents=True, exist_ok=True)
            if not os.access(self.path, os.W_OK):
                raise PermissionError(13, "Permission denied")
        except OSError as error:
            raise self._unusable(error) from None

    def begin(self):
        """Say that this is a search, and name it."""
        RunFolder.write_json(self.about, {"keras_emr": __version__, "id": uuid.uuid4().hex})

    @property
    def id(self):
        """Of the search, the same for all who work on it."""
        return json.loads(self.about.read_text())["id"]

    def ended(self):
        """Results of the trials that have ended, by name."""
        found = (read_result(path) for path in sorted(self.trials.glob("[0-9]*")))
        return [result for result in found if result is not None]

    def _unusable(self, error):
        return UserError(
            f"out: cannot use this folder: {error.strerror}. Received: {str(self.path)!r}. "
            "Choose another --out."
        )
