"""The data set that settings name, read as they say."""

from __future__ import annotations

from keras_emr_cli.progress import warn
from keras_emr_cli.train_settings import READING


def load_data(settings, validation=None):
    """Load ``settings.data``; a line on stderr where images were left out.

    Args:
        settings: merged, with ``data``, ``split_seed`` and those of ``READING``.
        validation: share held out; ``None``: the library's default.
    """
    from keras_emr.data import load

    share = {} if validation is None else {"validation": validation}
    data = load(settings.data, split_seed=settings.split_seed, **share, **reading(settings))
    if data.skipped:
        warn(f"{settings.data}: {len(data.skipped)} images left out; the first: {data.skipped[0]}")
    return data


def reading(settings):
    """The arguments of :func:`keras_emr.data.load` that say how to read, as far as they are set."""
    values = {setting.name: settings.values[setting.name] for setting in READING}
    return {name: value for name, value in values.items() if value is not None}
