"""``keras-emr data``: what can be trained on, what is in it, and TFDS data sets made of it."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import click

from keras_emr.errors import UserError
from keras_emr_cli.reading_settings import READING
from keras_emr_cli.settings import Setting, merge, options
from keras_emr_cli.train_settings import TRAIN

_CLASSES_SHOWN = 20
_FROM_TRAIN = {"split_seed", "validation", *(setting.name for setting in READING)}
INSPECT = [setting for setting in TRAIN if setting.name in _FROM_TRAIN]
PREPARE = [
    Setting("name", "text", None, "Name of the new data set.", auto="the source's"),
    Setting("version", "text", "1.0.0", "Its version."),
    Setting(
        "file_format",
        "choice",
        "array_record",
        "Its files; tf.data reads tfrecord, tfds.data_source array_record, keras-emr both.",
        ("array_record", "tfrecord"),
    ),
    Setting("licence", "text", None, "A note of its licence.", auto="the source's"),
    *(setting for setting in INSPECT if setting.name in ("image_size", "skip_bad")),
    Setting(
        "tfds_dir",
        "text",
        None,
        "Folder of prepared TFDS data sets, where it is written.",
        auto="TFDS_DATA_DIR, or ~/tensorflow_datasets",
    ),
]


@click.group()
def command():
    """What can be trained on: list it, inspect it, prepare it."""


@command.command("list")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def list_sources(as_json):
    """List the data sources that --data accepts."""
    from keras_emr.data import available

    sources = available()
    if as_json:
        click.echo(json.dumps(sources, indent=2))
        return
    from keras_emr_cli.tables import print_table

    columns = list(sources[0])
    rows = [["-" if s[c] is None else s[c] for c in columns] for s in sources]
    print_table(columns, rows, text_columns=2)


@command.command()
@click.argument("data")
@click.option("--picture", metavar="FILE", help="PNG of samples.  [default: NAME-samples.png]")
@click.option("--no-picture", is_flag=True, help="Draw none.")
@click.option("--overwrite", is_flag=True, help="Replace the picture.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@options(INSPECT)
def inspect(data, picture, no_picture, overwrite, as_json, **flags):
    """Print what DATA (as for --data) holds, and draw the first images of every class."""
    settings = merge([_DATA, *INSPECT], {**flags, "data": data}, environment=_environment())
    if no_picture and picture:
        raise click.UsageError("--picture and --no-picture exclude each other")
    if picture is not None:
        _check_picture(Path(picture), overwrite)
    from keras_emr_cli.load_data import load_data

    loaded = load_data(settings, settings.validation)
    path = None
    if not no_picture:
        path = Path(picture or f"{loaded.name}-samples.png")
        _check_picture(path, overwrite)
    from keras_emr.data.summary import samples_figure, summarize

    facts = summarize(loaded)
    if path is not None:
        _draw(samples_figure(loaded), path)
    if as_json:
        click.echo(json.dumps({**facts, "picture": path and str(path)}, indent=2))
    else:
        _show(facts, path)


@command.command()
@click.argument("data")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@options(PREPARE)
def prepare(data, as_json, **flags):
    """Make a TFDS data set of DATA: idx files, FILE.npz, a folder of pictures, or another one.

    Offline. It appears as TFDS_DIR/NAME/VERSION once it is whole, with the splits that DATA itself
    has, and is read as tfds:NAME.
    """
    settings = merge([_DATA, *PREPARE], {**flags, "data": data}, environment=_environment())
    from keras_emr.data.prepare import prepare as write
    from keras_emr.data.prepare import target
    from keras_emr.data.registry import open_source
    from keras_emr.data.tfds import require_tfds
    from keras_emr_cli.load_data import LookingAtImages, warn_of_skipped

    if settings.name is not None:
        target(settings.name, settings.version, settings.tfds_dir)  # before anything is read
    require_tfds()
    with LookingAtImages() as progress:
        source = open_source(
            data,
            image_size=settings.image_size,
            skip_bad=settings.skip_bad,
            tfds_dir=settings.tfds_dir,
            progress=progress,
        )
    warn_of_skipped(data, source.skipped)
    name = settings.name or _as_name(source.name)
    folder = write(
        source,
        name,
        version=settings.version,
        data_dir=settings.tfds_dir,
        file_format=settings.file_format,
        licence=settings.licence,
    )
    splits = {split: len(part) for split, part in source.parts.items()}
    if as_json:
        made = {"name": name, "version": settings.version, "folder": str(folder), "splits": splits}
        click.echo(json.dumps(made, indent=2))
        return
    counts = ", ".join(f"{count} {split}" for split, count in splits.items())
    click.echo(f"tfds:{name}:{settings.version}: {counts}; {folder}")
    click.echo(f"use it with: --data tfds:{name} --tfds-dir {folder.parents[1]}")


_DATA = Setting("data", "text", None, "Data set.")


def _environment():
    """Where data are, but not which: that is an argument here."""
    return {k: v for k, v in os.environ.items() if k != _DATA.environment}


def _as_name(text):
    """A name that TFDS takes."""
    return re.sub(r"\W+", "_", text.lower(), flags=re.ASCII).strip("_")


def _check_picture(path, overwrite):
    if path.exists() and (not overwrite or path.is_dir()):
        raise UserError(
            f"--picture: is there already. Received: {str(path)!r}. Expected another FILE, or"
            " --overwrite."
        )
    if not path.resolve().parent.is_dir():
        raise UserError(
            f"--picture: no such folder. Received: {str(path)!r}. Expected a file in a folder that"
            " exists."
        )


def _draw(figure, path):
    from keras_emr.evaluation.plots import save

    aside = path.with_name(f".{path.name}.part")
    try:
        save(figure, aside)
        aside.replace(path)
    except OSError as error:
        aside.unlink(missing_ok=True)
        raise UserError(
            f"--picture: cannot be written: {error.strerror}. Received: {str(path)!r}."
        ) from None


def _show(facts, path):
    from keras_emr_cli.tables import print_table

    per_class = {split: dict(found["per_class"]) for split, found in facts["splits"].items()}
    names = [name for name, _ in facts["splits"]["train"]["per_class"]]
    rows = [
        [label, name, *(counts[name] for counts in per_class.values())]
        for label, name in enumerate(names[:_CLASSES_SHOWN])
    ]
    if len(names) > _CLASSES_SHOWN:
        rows.append(["...", f"{len(names) - _CLASSES_SHOWN} more (--json has them)", "", "", ""])
    rows.append(["", "all", *(found["images"] for found in facts["splits"].values())])
    print_table(["label", "class", *per_class], rows, text_columns=2)
    low, high = facts["range"]
    height, width, channels = facts["image_shape"]
    click.echo(
        f"{facts['name']}: images {height}x{width}x{channels}, {facts['classes']} classes, pixels"
        f" {low:g} to {high:g}; {'read from disk' if facts['streamed'] else 'in memory'}"
    )
    found = [f"{count} {where}" for where, count in facts["duplicates"].items() if count]
    click.echo(f"duplicates: {', '.join(found) or 'none'}")
    click.echo(f"licence: {facts['licence']}")
    click.echo(f"sha256: {facts['sha256']}")
    if facts["skipped"]:
        click.echo(f"left out: {len(facts['skipped'])} (--json names them)")
    if path is not None:
        click.echo(f"picture: {path}")
