"""The data set that settings name, read as they say."""

from __future__ import annotations

import time

import click

from keras_emr_cli.reading_settings import READING

# Seconds after which it is said that images are being read.
_PATIENCE = 3.0


class LookingAtImages:
    """A callable ``(done, total)`` that shows, once it takes long, how far the first look is."""

    def __init__(self, quiet=False):
        self._quiet, self._began = quiet, time.monotonic()
        self._reporter = self._update = None

    def __enter__(self):
        return self

    def __exit__(self, *error):
        if self._reporter is not None:
            self._reporter.__exit__(*error)

    def __call__(self, done, total):
        if self._update is None:
            if self._quiet or time.monotonic() - self._began < _PATIENCE:
                return
            from keras_emr_cli.reporter import Reporter

            self._reporter = Reporter()
            self._reporter.__enter__()
            self._update = self._reporter.by_title()
        self._update("looking at every image", done, total)


def load_data(settings, validation=None, quiet=False):
    """Load ``settings.data``; a line on stderr where images were left out.

    Args:
        settings: merged, with ``data``, ``split_seed`` and those of ``READING``.
        validation: share held out; ``None``: the library's default.
        quiet: show nothing while many images are read.
    """
    from keras_emr.data import load

    options = {} if validation is None else {"validation": validation}
    with LookingAtImages(quiet) as progress:
        options |= {"split_seed": settings.split_seed, "progress": progress, **reading(settings)}
        data = load(settings.data, **options)
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


def load_extra(settings, data):
    """The extra training data, or ``None``; whatever is wrong with it is said now."""
    if settings.extra_data is None:
        return None
    from keras_emr.data.extra import load_extra as read

    extra = read(settings.extra_data, settings.extra_ratio, data.image_shape, data.classes)
    extra.share_of(settings.batch_size)
    return extra
