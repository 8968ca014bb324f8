"""``keras-emr data``: what can be trained on."""

from __future__ import annotations

import json

import click


@click.group()
def command():
    """What data can be trained on."""


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
