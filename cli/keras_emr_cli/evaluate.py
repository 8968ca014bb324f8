"""``keras-emr evaluate``: attack a trained model and report what can be believed."""

from __future__ import annotations

import contextlib
import hashlib
import json
import platform
import signal
from pathlib import Path

import click

from keras_emr.errors import UserError
from keras_emr_cli.evaluate_settings import EVALUATE
from keras_emr_cli.load_data import load_data
from keras_emr_cli.settings import Merged, merge, options
from keras_emr_cli.targets import filled, load_model, require_same_data, resolve


@click.command(name="evaluate")
@click.argument("target", metavar="[RUN_OR_MODEL]", required=False)
@click.option("--config", metavar="FILE", help="YAML file of these settings.")
@click.option("--checkpoint", metavar="best|last", help="Which model of a run.  [default: best]")
@click.option("--overwrite", is_flag=True, help="Replace the report of another evaluation.")
@click.option("--fresh", is_flag=True, help="Forget an evaluation that was cut short.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
@click.option("--quiet", is_flag=True, help="No progress on stderr.")
@options(EVALUATE)
def command(target, config, checkpoint, overwrite, fresh, as_json, quiet, **flags):
    """Attack RUN_OR_MODEL (a run folder or any .keras classifier) on test data.

    A run folder brings its data and epsilon; a .keras file needs --data and --epsilon. Writes
    report.json and report.html; one that is cut short (Ctrl-C, a kill, --time-budget) goes on
    where it stopped when it is called again. Exit code 75: cut short, can go on.

    With --url the model that is served there is attacked, by asking only (a black box); a
    RUN_OR_MODEL is then its source: images made against it are tried on the served model, and
    both models' labels are compared. A server that goes away: exit code 75, call it again.
    """
    settings = merge(EVALUATE, flags, config)
    served = settings.url is not None
    if target is None and not served:
        raise click.UsageError("Missing argument 'RUN_OR_MODEL' (or --url of a served model).")
    if served:
        from keras_emr_serving.client.address import parse

        parse(settings.url)  # before anything takes long
    its_own_data = settings.data is None  # explicit data may be any
    if target is None:
        if checkpoint is not None:
            raise UserError(f"--checkpoint needs a run folder. Received: {checkpoint!r} alone.")
        path, settings, run = None, filled(settings, {}, "a served model"), {}
    else:
        path, settings, run = resolve(Path(target), checkpoint, settings)
    if not float(settings.epsilon) > 0:
        raise UserError(f"--epsilon: of the run is {settings.epsilon}. Expected more than 0.")
    out = _folder(target and Path(target), settings, overwrite)
    from keras_emr_cli.session import select_backend

    select_backend(settings.backend)
    if served:
        from keras_emr_cli.evaluate_served import chosen

        settings = chosen(settings, path is not None)
    data = load_data(settings, run["validation"] if its_own_data else None, quiet)
    if its_own_data:
        require_same_data(Path(target), data, settings)
    from keras_emr.training.callbacks import Interrupted, StopOnSignal
    from keras_emr_cli.main import EXIT_INTERRUPTED, EXIT_RESUMABLE, fail
    from keras_emr_cli.session import signals_to

    stop = StopOnSignal()
    try:
        with signals_to(stop):
            report = (_evaluate_served if served else _evaluate_file)(
                path, settings, data, out, fresh, quiet, stop
            )
    except Interrupted as error:
        number = signal.Signals(error.signal_number)
        code = EXIT_INTERRUPTED if number == signal.SIGINT else EXIT_RESUMABLE
        return fail(f"interrupted ({number.name}); call it again to go on where it stopped", code)
    except _ServerAway as error:
        return fail(*error.args)
    if as_json:
        click.echo(json.dumps(report, indent=2))
    else:
        from keras_emr_cli.evaluate_report import show

        show(report, out)
    if not report["complete"]:
        click.echo("stopped by --time-budget; call it again to go on", err=True)
        return EXIT_RESUMABLE


def _folder(target, settings, overwrite):
    """The folder for the report; nothing is made yet."""
    if settings.out is not None:
        out = Path(settings.out)
    elif settings.url is not None:
        from keras_emr_serving.client.address import parse

        out = Path(f"{parse(settings.url).name}-report")
    elif target.is_dir():
        out = target / "report"
    else:
        out = target.with_name(f"{target.stem}-report")
    if out.exists() and not out.is_dir():
        raise UserError(f"out: not a folder. Received: {str(out)!r}.")
    _require_free(out, overwrite)
    return out


def _require_free(out, overwrite):
    """A finished report is replaced only if that is asked for, another's file never."""
    file = out / "report.json"
    if not file.exists() and not (out / "report.html").exists():
        return
    try:
        old = json.loads(file.read_text())
        ours = str(old["schema"]).startswith("keras-emr-report/")
    except (OSError, ValueError, KeyError, TypeError):
        ours = False
    if not ours:
        raise UserError(
            "out: refusing to overwrite a report that is not an evaluation of keras_emr. Received: "
            f"{str(out)!r}. Choose another --out."
        )
    if old.get("complete") and not overwrite:
        raise UserError(
            f"out: there is a finished report. Received: {str(out)!r}. Use --overwrite to replace "
            "it, or another --out."
        )


class _ServerAway(Exception):
    """A message and an exit code."""


def _evaluate_file(path, settings, data, out, fresh, quiet, stop):
    from keras_emr.evaluation.inputs import require_fit
    from keras_emr.evaluation.target import KerasTarget, auto_batch_size

    model = load_model(path)
    require_fit(model, data.image_shape, data.classes)
    size = settings.batch_size or auto_batch_size(model, data.image_shape)
    about = {
        "name": path.resolve().parent.name if path.stem in ("best", "last") else path.stem,
        "path": str(path),
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "parameters": model.count_params(),
    }
    target, settings = KerasTarget(model, size), _sized(settings, size)
    return _evaluate(path, target, about, settings, data, out, fresh, quiet, stop)


def _evaluate_served(path, settings, data, out, fresh, quiet, stop):
    from keras_emr_cli.evaluate_served import connect, load_source, model_entry, served_target
    from keras_emr_cli.main import EXIT_FAILURE, EXIT_INVALID, EXIT_RESUMABLE
    from keras_emr_serving.client.errors import ClientError

    settings, met = _sized(settings, settings.batch_size or 256), False
    source = None if path is None else load_source(path, data)
    try:
        with connect(settings) as client:
            target = served_target(client, data, settings.batch_size)
            about, met = model_entry(client), True
            return _evaluate(path, target, about, settings, data, out, fresh, quiet, stop, source)
    except ClientError as error:
        if met and error.temporary:
            again = f"{error}; call it again to go on where it stopped"
            raise _ServerAway(again, EXIT_RESUMABLE) from None
        code = EXIT_INVALID if error.mistake else EXIT_FAILURE
        raise _ServerAway(str(error), code) from None


def _sized(settings, size):
    return Merged({**settings.values, "batch_size": size}, settings.origins)


def _evaluate(path, target, about, settings, data, out, fresh, quiet, stop, source=None):
    """``about``: the entry ``model`` of the report. ``source``: of a served model, or ``None``."""
    from keras_emr.evaluation.assessment import Assessment
    from keras_emr.evaluation.inputs import checked_examples
    from keras_emr.reports.files import write_report
    from keras_emr.training.callbacks import Interrupted
    from keras_emr_cli.evaluate_attacks import jobs, surrogates
    from keras_emr_cli.reporter import Reporter

    n, size = settings.n_examples, settings.batch_size
    x, y = checked_examples(data.x_test[:n], data.y_test[:n], target.classes)
    todo = jobs(settings, path, data, source)
    states = out / "state"
    if fresh:
        _forget(states)

    def tick():
        if stop.requested is not None:
            raise Interrupted(stop.requested)

    with Reporter(quiet) as reporter:
        bars = reporter.by_title()

        def progress(*moved):
            bars(*moved)
            tick()

        assessment = Assessment(
            target,
            x,
            y,
            float(settings.epsilon),
            settings.norm,
            seed=settings.seed,
            batch_size=size,
            extra_examples=settings.extra_examples,
            siblings=surrogates(settings, data, source),
            natural=_natural(path, data) if settings.url is None else None,
            progress=progress,
            tick=tick,
        )
        compared = {}
        if source is not None:
            from keras_emr_cli.evaluate_served import agreement

            found = agreement(source, path, target, x, y, settings, progress)
            compared = {"source": found}
        outcome = assessment.attack(todo, states, settings.time_budget)
        outcome.notes += _remarks(settings, data, y)
        report = {
            **assessment.report(outcome),
            **_circumstances(about, settings, data, target, outcome, todo),
            **compared,
        }
        if outcome.complete or not _finished(out):
            write_report(out, report, assessment.images(report, outcome))
    if outcome.complete:
        _forget(states)
    return report


def _finished(out):
    try:
        return json.loads((out / "report.json").read_text())["complete"]
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _forget(states):
    """Remove our state files, and their folder if nothing else is in it."""
    for file in states.glob("[0-9][0-9]-*.npz*"):
        file.unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        states.rmdir()


def _circumstances(about, settings, data, target, outcome, todo):
    """What only this command knows: model, data, threat model, settings, environment."""
    from keras_emr_cli.evaluate_attacks import knowledge

    epsilon, n = float(settings.epsilon), len(outcome.correct)
    name = Path(settings.data).name or str(settings.data)
    standard = outcome.suites.get("standard") if outcome.complete else None
    percent = {
        "clean_acc": round(100 * float(outcome.correct.mean()), 4),
        "autoattack_acc": None if standard is None else round(100 * standard, 4),
    }
    return {
        "model": about,
        "data": {
            "name": name,
            "sha256": data.fingerprint,
            "n": len(data.x_test),
            "classes": target.classes,
            "image_shape": list(data.image_shape),
            "split": "test",
        },
        "threat_model": {
            "norm": settings.norm,
            "epsilon": epsilon,
            "epsilon_text": str(settings.epsilon),
            "knowledge": knowledge(todo),
        },
        "settings": {
            **settings.plain(),
            "batch_size": settings.batch_size,
            "bn_mode": _bn_mode(settings),
        },
        "robustbench": {
            "dataset": name,
            "threat_model": {"linf": "Linf", "l2": "L2"}[settings.norm],
            "eps": epsilon,
            **percent,
            "best_known": None,
            "additional_data": None,
            "n": n,
        },
        "environment": _environment(),
    }


def _bn_mode(settings):
    return "inference" if settings.url is None else "served"


def _remarks(settings, data, y):
    """What is odd about the first N images."""
    remarks = []
    if settings.n_examples and settings.n_examples > len(data.y_test):
        remarks.append(f"there are only {len(data.y_test)} test images")
    missing = data.classes - len(set(y.tolist()))
    if missing:
        remarks.append(f"{missing} of {data.classes} classes are not among these {len(y)} images")
    return remarks


def _natural(path, data):
    """The standard model that a run was trained beside, for the checks."""
    from keras_emr.evaluation.inputs import require_fit

    file = path.parent / "baseline" / "best.keras"
    if not file.exists():
        return None
    try:
        model = load_model(file)
        require_fit(model, data.image_shape, data.classes)
    except UserError:
        return None
    return model


def _environment():
    from keras_emr.training.run_folder import describe_environment

    told = describe_environment()
    hardware = told["hardware"]
    return {
        **told["versions"],
        **hardware,
        "platform": platform.platform(),
        "processor": platform.processor() or hardware["machine"] or None,
    }
