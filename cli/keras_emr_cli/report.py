"""``keras-emr report``: evaluations side by side."""

from __future__ import annotations

import json
from pathlib import Path

import click

from keras_emr.errors import UserError

NAME = "report-comparison.html"
_MARK = b'<meta name="keras-emr-page" content="comparison">'


@click.command(name="report")
@click.argument("targets", metavar="RUN_OR_REPORT...", nargs=-1, required=True)
@click.option("--out", metavar="FILE_OR_DIR", help=f"Where the page goes.  [default: {NAME}]")
@click.option("--overwrite", is_flag=True, help="Replace --out even if it is not such a page.")
@click.option("--json", "as_json", is_flag=True, help="Print the comparison as JSON.")
def command(targets, out, overwrite, as_json):
    """Compare evaluations: a table, and one HTML page that opens without a network.

    RUN_OR_REPORT is a run that keras-emr evaluate has reported on, the folder of a report, or a
    report.json. Accuracies under attack are upper bounds of robust accuracy.
    """
    out = _check_out(out, overwrite)
    from keras_emr.reports.compare import differences, row, titles
    from keras_emr.reports.files import find_report, read_images, read_report, write_files
    from keras_emr.reports.page import COMPARISON, page

    paths = [find_report(target) for target in targets]
    _require_distinct(paths)
    reports = [read_report(path) for path in paths]
    images = [read_images(path) for path in paths]
    text = page(reports, images, COMPARISON)
    write_files(out.parent, {out.name: text.encode(errors="replace")})
    rows = [row(title, report) for title, report in zip(titles(reports), reports, strict=True)]
    _show(rows, differences(reports), out, as_json)


def _check_out(out, overwrite):
    """The file to write; nothing is changed yet."""
    path = Path(out or NAME)
    if path.is_dir() or (out and (out.endswith("/") or not path.suffix)):
        path = path / NAME
    if path.is_dir():
        raise UserError(f"--out: a folder is in the way. Received: {str(path)!r}.")
    try:
        ours = not path.exists() or _MARK in path.read_bytes()[:4096]
    except OSError as error:
        raise UserError(
            f"--out: cannot use this file: {error.strerror}. Received: {str(path)!r}. Choose "
            "another --out."
        ) from None
    if not ours and not overwrite:
        raise UserError(
            "--out: the file is not a page of keras-emr report. Received: "
            f"{str(path)!r}. Use --overwrite to replace it, or another --out."
        )
    return path


def _require_distinct(paths):
    resolved = [path.resolve() for path in paths]
    for i, path in enumerate(resolved):
        if path in resolved[:i]:
            raise UserError(
                f"a report twice. Received: {str(paths[i])!r} again. Give each report once."
            )


def _show(rows, warnings, out, as_json):
    if as_json:
        content = {"reports": rows, "warnings": warnings, "page": str(out)}
        click.echo(json.dumps(content, indent=2, allow_nan=False))
        return
    from rich.markup import escape

    from keras_emr_cli.tables import figure, percent, print_table

    columns = ["model", "clean", "robust", "95 % interval", "AutoAttack", "n", "ball", "checks"]
    columns += ["margin", "margin > eps"]
    cells = []
    for one in rows:
        found, share = one["autoattack_percent"], one["share_above_epsilon"]
        cells.append(
            [
                escape(_printable(one["model"])) + ("" if one["complete"] else " (incomplete)"),
                percent(one["clean"]),
                percent(one["robust"]),
                " - ".join(f"{100 * end:.1f}" for end in one["robust_interval"]),
                "not run" if found is None else f"{found:.2f} %",
                one["n"],
                _printable(f"{one['norm']} {one['epsilon_text']}"),
                one["checks"],
                figure(one[f"effective_margin_{one['norm']}"], 4),
                "-" if share is None else percent(share),
            ]
        )
    print_table(columns, cells)
    for warning in warnings:
        click.echo(f"Not comparable number by number. {_printable(warning)}")
    click.echo(
        "Accuracy under attacks is an upper bound of robust accuracy. margin: the mean effective "
        "margin of clean images, in the ball's norm."
    )
    click.echo(f"page: {out}")


def _printable(text):
    """Names come from files: nothing in them may steer the terminal."""
    return "".join(c if c.isprintable() else "?" for c in text)
