"""The data sets that development has beside the clone and nobody else needs."""

import os
from pathlib import Path

_BESIDE = Path(__file__).resolve().parents[2] / "shared" / "data"


def real_data(name):
    """Folder of a data set (``mnist``, ``cifar10``), or None."""
    folder = Path(os.environ.get("KERAS_EMR_TEST_DATA", _BESIDE)) / name
    return folder if folder.is_dir() else None
