"""What ``keras-emr evaluate`` prints."""

from __future__ import annotations

import click

from keras_emr.reports.views import same_labels
from keras_emr_cli.tables import figure, percent, print_table

_WORST_FIRST = ("fail", "warn")


def show(report, out):
    """The report in short, on stdout."""
    columns = ["attack", "examples", "attacked", "broken", "robust accuracy", "queries", "seconds"]
    rows = [
        [
            entry["name"],
            "all right ones" if entry["mode"] == "individual" else "survivors",
            entry["attacked"],
            entry["broken"],
            percent(entry["robust_accuracy"]),
            entry["queries"] or "-",
            f"{entry['seconds']:.0f}",
        ]
        for entry in report["attacks"]
    ]
    print_table(columns, rows, text_columns=2)
    accuracy, model = report["accuracy"], report["threat_model"]
    click.echo(f"clean accuracy    {percent(accuracy['clean'])}")
    click.echo(
        f"robust accuracy   {percent(accuracy['robust'])}  ({accuracy['survived']} of "
        f"{accuracy['n']} survive every attack; an upper bound)"
    )
    if report.get("source"):
        _source(report["source"])
    margins = report["margins"] and report["margins"]["clean"]
    if margins:
        click.echo(
            f"effective margin  L2 {figure(margins['effective_margin_l2'], 3)}, Linf "
            f"{figure(margins['effective_margin_linf'], 4)}; above epsilon for "
            f"{percent(margins['share_above_epsilon'])}"
        )
    _checks(report["checks"])
    for note in report["notes"]:
        click.echo(f"note: {note}")
    settings, where = report["settings"], report["model"]["path"]
    click.echo(
        f"{where or settings['url']}: {accuracy['n']} test images of {report['data']['name']}; "
        f"{model['norm']}, epsilon {model['epsilon_text']}; seed {settings['seed']}; "
        f"{settings['backend']}; {'inference mode' if where else 'asked as it is served'}."
    )
    click.echo(f"report: {out / 'report.html'}")


def _source(source):
    n, shown = source["n"], {"clean": "clean", "adversarial": f"{source['attack']} on the source"}
    told = (f"{text}: {same_labels(source, at)} of {n}" for at, text in shown.items())
    click.echo(f"same labels as the source  {'; '.join(told)}")


def _checks(checks):
    if not checks:
        return
    counts = {}
    for check in checks:
        counts[check["verdict"]] = counts.get(check["verdict"], 0) + 1
    told = ", ".join(f"{n} {verdict}" for verdict, n in sorted(counts.items()))
    click.echo(f"checks            {told}")
    for verdict in _WORST_FIRST:
        for check in checks:
            if check["verdict"] == verdict:
                click.echo(f"  {verdict} {check['id']}: {check['text']}")
