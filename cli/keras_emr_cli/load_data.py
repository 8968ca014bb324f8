"""The data set that settings name, read as they say."""

from __future__ import annotations

import click

from keras_emr_cli.reading_settings import READING


def load_data(settings, validation=None):
    """Load ``settings.data``; a line on stderr where images were left out.

    Args:
        settings: merged, with ``data``, ``split_seed`` and those of ``READING``.
        validation: share held out; ``None``: the library's default.
    """
    from keras_emr.data import load

    share = {} if validation is None else {"validation": validation}
    data = load(settings.data, split_seed=settings.split_seed, **share, **reading(settings))
    warn_of_skipped(settings.data, data.skipped)
    return data


def warn_of_skipped(source, skipped):
    """A line on stderr where images were left out."""
    if skipped:
        text = f"{source}: {len(skipped)} images left out; the first: {skipped[0]}"
        click.echo(f"Warning: {text}", err=True)


def reading(settings):
    """The arguments of :func:`keras_emr.data.load` that say how to read, as far as they are set."""
    values = {setting.name: settings.values[setting.name] for setting in READING}
    return {name: value for name, value in values.items() if value is not None}
