"""Nothing of what a test has looked at is kept in the user's cache."""

import pytest

from keras_emr.data import scan_cache


@pytest.fixture(autouse=True)
def scans(tmp_path, monkeypatch):
    """The folder of kept scans, empty."""
    folder = tmp_path.parent / f"{tmp_path.name}-scans"
    monkeypatch.setattr(scan_cache, "cache_folder", lambda: folder)
    return folder
