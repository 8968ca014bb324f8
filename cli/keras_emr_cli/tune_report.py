"""What a search found: the finalists' strong scores, tables, files, the plot."""

from __future__ import annotations

import csv
import io
import json
import os

import click

from keras_emr_cli.tune_space import as_text


def line(result, settings):
    """One line about a trial that has ended."""
    if not result.ok:
        return f"trial {result.trial}  failed: {result.message}"
    shown = [f"{settings.objective} {result.score:.4f}"]
    if result.clean is not None:
        shown.append(f"clean {result.clean:.4f}")
    shown.append(f"{result.epochs} epochs")
    if result.status != "completed":
        shown.append(result.status)
    return f"trial {result.trial}  {'  '.join(shown)}  {values_text(result.values)}"


def values_text(values):
    """``beta 2.5, defense trades``."""
    return ", ".join(f"{name} {_short(value)}" for name, value in values.items())


def conclude(settings, space, folder, data, stop, reporter):
    """Judge the finalists and write the results; the report as a dictionary."""
    from keras_emr.training.run_folder import RunFolder
    from keras_emr.tuning.finalists import finalists, pareto, ranked
    from keras_emr_cli.tune_trial import strong_name

    results = folder.ended()
    chosen = finalists(results, settings.finalists)
    strong = _judge(settings, folder, data, chosen, stop, reporter)
    by_robust = settings.objective == "val_robust_accuracy"
    scores = {name: found["robust"] for name, found in strong.items()} if by_robust else {}
    order = [result.trial for result in ranked(results, scores)]
    order += [result.trial for result in results if result.trial not in order]
    by_name = {result.trial: result for result in results}
    held = [by_name[name] for name in order if by_name[name].epoch is not None]
    points = {r.trial: (r.clean, r.robust) for r in held if r.robust is not None}
    front = pareto(points)
    trials = [_row(by_name[name], strong.get(name), name in front, folder) for name in order]
    plain = settings.plain()
    report = {
        "kind": "keras-emr tune",
        "search": str(folder.path),
        "winner": order[0] if held else None,
        "cheap_attack": f"PGD-{settings.prune_steps}x1",
        "strong_attack": strong_name(settings),
        "judged_on": "validation data",
        "settings": {k: v for k, v in plain.items() if k not in [p.name for p in space]},
        "space": folder.space.read_text(),
        **json.loads(folder.environment.read_text()),
        "pareto": front,
        "trials": trials,
    }
    RunFolder.write_json(folder.results, report)
    RunFolder.write_text(folder.csv, _csv(trials, [p.name for p in space]))
    if points:
        _plot(report, folder, settings)
    return report


def _judge(settings, folder, data, chosen, stop, reporter):
    """The strong attack on the finalists' best epochs: ``{trial: score}``."""
    from keras_emr.training.callbacks import Interrupted
    from keras_emr.tuning.finalists import strong_score
    from keras_emr_cli.tune_trial import strong_attack

    def tick():
        if stop.requested is not None:
            raise Interrupted(stop.requested)

    tick()
    found = {}
    for result in chosen:
        bar = reporter.steps(f"strong attack on trial {result.trial}")
        found[result.trial] = strong_score(
            folder.trials / result.trial,
            strong_attack(settings),
            data.x_val[:],
            data.y_val,
            progress=lambda name, done, total, bar=bar: bar(done, total),
            tick=tick,
        )
    return found


def _row(result, strong, on_front, folder):
    run = folder.trials / result.trial
    return {
        "trial": result.trial,
        "status": result.status,
        "values": dict(result.values),
        "score": result.score,
        "clean": result.clean,
        "robust": result.robust,
        "strong_clean": strong and strong["clean"],
        "strong_robust": strong and strong["robust"],
        "strong_minus_cheap": strong and strong["robust"] - result.robust,
        "pareto": on_front,
        "epoch": result.epoch,
        "epochs": result.epochs,
        "seconds": result.seconds,
        "continues": result.continues,
        "message": result.message,
        "run": str(run),
    }


def _csv(trials, names):
    out = io.StringIO()
    plain = [key for key in (trials[0] if trials else {}) if key != "values"]
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow([*plain, *names])
    for trial in trials:
        values = [trial["values"].get(name) for name in names]
        writer.writerow([*(trial[key] for key in plain), *map(_cell, values)])
    return out.getvalue()


def _cell(value):
    return "" if value is None else as_text(value)


def _plot(report, folder, settings):
    from keras_emr.evaluation import plots
    from keras_emr.tuning.figure import pareto_figure
    from keras_emr_cli.tune_trial import ball

    epsilon = settings.judge_epsilon or settings.epsilon
    title = f"{settings.search} search, {settings.data}: {ball(settings)[1]}, epsilon {epsilon}"
    figure = pareto_figure(
        report["trials"], report["pareto"], report["cheap_attack"], report["strong_attack"], title
    )
    aside = folder.plot.with_name(f".{folder.plot.name}.part")
    plots.save(figure, aside)
    os.replace(aside, folder.plot)


def show(report, settings, as_json):
    """Print the table, or the report as JSON."""
    if as_json:
        click.echo(json.dumps(report, indent=2))
        return
    from keras_emr_cli.tables import print_table
    from keras_emr_cli.tune_trial import ball

    strong, cheap = report["strong_attack"], report["cheap_attack"]
    columns = ["trial", "settings", "status", "epochs", "clean", cheap, strong, "difference"]
    rows = [
        [
            trial["trial"] + ("*" if trial["pareto"] else ""),
            values_text(trial["values"]),
            trial["status"],
            _epochs(trial),
            _percent(trial["clean"]),
            _percent(trial["robust"]),
            _percent(trial["strong_robust"]),
            _percent(trial["strong_minus_cheap"], points=True),
        ]
        for trial in report["trials"]
    ]
    print_table(columns, rows, text_columns=3)
    epsilon, norm = settings.judge_epsilon or settings.epsilon, ball(settings)[1]
    click.echo(
        f"{settings.data}: validation images; {norm}, epsilon {epsilon}; seed {settings.seed}; "
        f"{settings.backend} {report['versions'][settings.backend]}; *: on the Pareto front of "
        f"clean and {cheap} accuracy."
    )
    click.echo(
        "difference: strong less cheap attack, in points. The best of many on validation data "
        "looks better than it is: evaluate it on test data."
    )
    if report["winner"] is not None:
        run = next(t["run"] for t in report["trials"] if t["trial"] == report["winner"])
        click.echo(f"best: {run}  (keras-emr evaluate {run})")
    click.echo(f"search: {report['search']}")


def _epochs(trial):
    return "-" if trial["epoch"] is None else f"{trial['epoch']} of {trial['epochs']}"


def _percent(value, points=False):
    if value is None:
        return "-"
    return f"{100 * value:+.1f}" if points else f"{100 * value:.1f} %"


def _short(value):
    return f"{value:.4g}" if isinstance(value, float) else str(value)
