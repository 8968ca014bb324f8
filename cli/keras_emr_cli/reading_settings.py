"""Options of all commands that read data."""

from __future__ import annotations

from keras_emr_cli.settings import Setting as S


def reading(skip_bad=None, stream=None):
    """How data are read; without defaults where a run may say it."""
    run = None if stream else "the run's, or "
    return [
        S(
            "image_size",
            "text",
            None,
            "HxW that pictures are resized to.",
            auto="the size that all have" if stream else "the run's, or the size that all have",
        ),
        S(
            "skip_bad",
            "bool",
            skip_bad,
            "Leave out pictures that cannot be used, and say so.",
            auto=run and run + "no",
        ),
        S(
            "stream",
            "choice",
            stream,
            "Read pictures and TFDS batch by batch; auto: above 2 GiB.",
            ("auto", "always", "never"),
            auto=run and run + "auto",
        ),
        S(
            "tfds_dir",
            "text",
            None,
            "Folder of prepared TFDS data sets.",
            auto="TFDS_DATA_DIR, or ~/tensorflow_datasets",
        ),
    ]


READING = reading()
