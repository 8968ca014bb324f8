"""What ``keras-emr compare`` leaves in its folder and prints."""

from __future__ import annotations

import json
import os

import click

REPORT, LOSS_PLOT, SURFACE_PLOT = "report.json", "inner_loss.png", "loss_surface.png"


def write(out, report, surfaces):
    """The three files, each aside first and then renamed into place."""
    from keras_emr.evaluation import plots
    from keras_emr.training.run_folder import RunFolder

    epsilon = report["settings"]["epsilon"]
    figures = {
        LOSS_PLOT: plots.inner_loss_figure(report["models"], epsilon, report["timed_batch"]),
        SURFACE_PLOT: plots.loss_surface_figure(surfaces, epsilon),
    }
    for name, figure in figures.items():
        aside = out / f".{name}.part"
        plots.save(figure, aside)
        os.replace(aside, out / name)
    RunFolder.write_json(out / REPORT, report)


def show(report, settings, out, as_json):
    if as_json:
        click.echo(json.dumps(report, indent=2))
        return
    from keras_emr_cli.tables import print_table

    for model in report["models"]:
        click.echo(f"{model['name']}: mean cross-entropy under attack")
        print_table(*_attack_table(model, settings))
        if model["training"]:
            click.echo(f"{model['name']}: joint training of classifier and maximizer (at)")
            print_table(*_training_table(model))
    click.echo(
        f"{settings.data}: {report['n']} test images; linf, epsilon {settings.epsilon}; seed "
        f"{settings.seed}; {settings.backend} {report['versions'][settings.backend]}; inference "
        f"mode; learned maximizers trained for {settings.fit_epochs} epochs on training data."
    )
    click.echo(
        "pgd (tuned): the best step size for each number of steps, chosen on these very images. "
        "passes: input gradients + further forward passes."
    )
    click.echo(
        f"ms: an attack of T steps on a batch of {report['timed_batch']}, driven from the host; "
        "x pgd: over that of pgd; both without compilation."
    )
    click.echo(
        "Measured on these models and this machine, not a paper's tables. robust T: one start and "
        "the iterate after T steps, a coarse upper bound of robust accuracy."
    )
    click.echo(f"report: {out}")


def _attack_table(model, settings):
    from keras_emr_cli.tables import percent

    multiples = sorted({1, *settings.more})
    columns = ["method", "T", "parameters"]
    columns += [f"loss {'' if m == 1 else m}T" for m in multiples]
    columns += ["robust T", "passes", "ms", "x pgd"]
    rows = []
    for entry in model["methods"]:
        runs = {run["multiple"]: run for run in entry["runs"]}
        rows.append(
            [
                entry["method"],
                entry["steps"],
                entry["parameters"],
                *(f"{runs[m]['final_loss']:.4f}" for m in multiples),
                percent(entry["robust_accuracy"]),
                " + ".join(str(n) for n in entry["passes"].values()),
                f"{1e3 * entry['seconds'][-1]:.1f}",
                f"{entry['time_relative_to_pgd']['median']:.2f}",
            ]
        )
    return columns, rows


def _training_table(model):
    columns = ["maximizer", "T", "parameters", "seconds / epoch", "step / pgd-T step", "quartiles"]
    rows = []
    for cost in model["training"]:
        ratio = cost["ratio_to_pgd_training"]
        rows.append(
            [
                cost["method"],
                cost["steps"],
                cost["parameters"],
                f"{cost['epoch_seconds']:.2f}",
                f"{ratio['median']:.2f}",
                f"{ratio['low']:.2f} to {ratio['high']:.2f}",
            ]
        )
    return columns, rows
