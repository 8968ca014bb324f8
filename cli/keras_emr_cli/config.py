"""``keras-emr config``: a commented template, and the merged settings with their origins."""

from __future__ import annotations

import json
from pathlib import Path

import click

from keras_emr.errors import UserError
from keras_emr_cli.presets import PRESETS
from keras_emr_cli.settings import merge, options, template
from keras_emr_cli.train_settings import TRAIN


@click.group()
def command():
    """Write a config file, or show the merged settings."""


@command.command()
@click.argument("file", default="keras-emr.yaml")
def init(file):
    """Write a commented template with every setting to FILE (`-`: print it)."""
    if file == "-":
        click.echo(template(TRAIN), nl=False)
        return
    try:
        with open(file, "x") as out:
            out.write(template(TRAIN))
    except FileExistsError:
        raise UserError(f"file exists. Received: {file!r}. Choose another name.") from None
    except OSError as error:
        raise UserError(f"cannot write the file: {error.strerror}. Received: {file!r}.") from None
    click.echo(f"wrote {Path(file)}", err=True)


@command.command()
def recipes():
    """List the recipes that `--config recipe:NAME` knows, and how sure each is."""
    from keras_emr.recipes import describe, names

    for name in names():
        click.echo(f"{name}: {describe(name)['Sure']}")


@command.command()
def space():
    """Print an example of what `tune --space FILE` takes."""
    from keras_emr_cli.tune_space import EXAMPLE

    click.echo(EXAMPLE, nl=False)


@command.command()
@click.option("--config", metavar="FILE", help="YAML file of settings, or recipe:NAME.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@options(TRAIN)
def show(config, as_json, **flags):
    """Print the settings of `train` as they would be used, with the origin of each value.

    Precedence: flag, environment (KERAS_EMR_...), --config FILE, --preset, default.
    """
    merged = merge(TRAIN, flags, config, presets=PRESETS)
    plain = merged.plain()
    if as_json:
        rows = {name: {"value": plain[name], "origin": merged.origins[name]} for name in plain}
        click.echo(json.dumps(rows, indent=2))
        return
    width = max(len(name) for name in plain)
    for name, value in plain.items():
        click.echo(f"{name:{width}}  {value!s:24}  {merged.origins[name]}")
