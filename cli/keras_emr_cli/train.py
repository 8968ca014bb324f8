"""``keras-emr train``: train, compare with a standard model, keep the run."""

from __future__ import annotations

import json
import re
import signal
from pathlib import Path

import click

from keras_emr.attacks import TRAINED_ATTACKS
from keras_emr.errors import UserError
from keras_emr_cli.defense_settings import mail_burn_in
from keras_emr_cli.load_data import load_data
from keras_emr_cli.settings import Merged, merge, options
from keras_emr_cli.train_settings import TRAIN, awp_warmup

# What may change when a run is resumed; the rest is fixed by its checkpoint.
# `stream` and `tfds_dir` do not change what is read, which has a hash.
_RESUMABLE = {"epochs", "eval_steps", "eval_restarts", "baseline", "out", "stream", "tfds_dir"}
_RESUMABLE |= {"early_stopping", "overfitting_guard"}


@click.command(name="train")
@click.option(
    "--config",
    metavar="FILE",
    help="YAML file of settings (`keras-emr config init`), or recipe:NAME (`config recipes`).",
)
@click.option("--resume", is_flag=True, help="Continue the run in --out after its last epoch.")
@click.option("--overwrite", is_flag=True, help="Replace the run in --out.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
@click.option("--quiet", is_flag=True, help="No progress on stderr.")
@options(TRAIN)
def command(config, resume, overwrite, as_json, quiet, **flags):
    """Train a robust classifier and compare it with a standard one.

    Without options: TRADES with effective margin regularization on the embedded digits.
    """
    settings = _settings(flags, config, resume, overwrite)
    from keras_emr_cli.session import select_backend

    select_backend(settings.backend)
    data = load_data(settings, settings.validation)
    return _run(settings, data, _extra(settings, data), resume, overwrite, as_json, quiet)


def _extra(settings, data):
    """The extra training data, or ``None``; whatever is wrong with it is said now."""
    if settings.extra_data is None:
        return None
    from keras_emr.data.extra import load_extra

    extra = load_extra(settings.extra_data, settings.extra_ratio, data.image_shape, data.classes)
    extra.share_of(settings.batch_size)
    return extra


def _settings(flags, config, resume, overwrite) -> Merged:
    if resume and overwrite:
        raise click.UsageError("--resume and --overwrite exclude each other")
    stored = None
    if resume:
        if flags.get("out") is None:
            raise click.UsageError("--resume needs --out RUN")
        stored = Path(flags["out"]) / "config.yaml"
        if config is None and stored.exists():
            config = str(stored)
    settings = merge(TRAIN, flags, config)
    if stored is not None and stored.exists():
        before = _settled(merge(TRAIN, {}, str(stored), environment={}))
        for name in ("mail_burn_in", "awp_warmup"):
            if settings.values[name] is None:  # the run's, not what more epochs would make of it
                kept = {**settings.values, name: before.values[name]}
                settings = Merged(kept, settings.origins)
        had, now = before.plain(), _settled(settings)
        fixed = {"epochs"} if before.lr_schedule in ("cosine", "cyclic") else set()
        for name, value in settings.plain().items():
            if (name not in _RESUMABLE or name in fixed) and now.values[name] != before.values[
                name
            ]:
                raise UserError(
                    f"{name}: a resumed run keeps its settings. Received: {value}, the run has "
                    f"{had[name]}. Leave it out, or train anew in another --out."
                )
    if settings.out is None:
        settings = Merged({**settings.values, "out": str(_fresh(settings))}, settings.origins)
    return settings


def _settled(s) -> Merged:
    """What ``config.yaml`` keeps: the same run from whichever folder, for however many epochs."""
    from keras_emr.data.registry import located
    from keras_emr.models.registry import located as located_model

    values = {**s.values, "data": located(s.data), "model": located_model(s.model)}
    if s.teacher is not None:
        values["teacher"] = located_model(s.teacher)
    for name in ("maximizer", "extra_data", "tfds_dir"):
        if values[name] is not None:
            values[name] = str(Path(values[name]).expanduser().resolve())
    if s.defense.startswith("mail-"):
        values["mail_burn_in"] = mail_burn_in(s)
    if s.awp:
        values["awp_warmup"] = awp_warmup(s)
    return Merged(values, s.origins)


def _fresh(s):
    """``runs/digits-small-cnn-trades-emr``, numbered from the second on."""
    from keras_emr.models.registry import short_name

    data = re.sub("^(tfds|restricted-imagenet):", "", s.data).split(":")[0]
    parts = [Path(data).stem, short_name(s.model), s.defense]
    parts += [s.attack] * (s.attack in TRAINED_ATTACKS) + ["emr"] * bool(s.emr)
    name = "-".join(parts)
    candidate, number = Path("runs") / name, 1
    while candidate.exists():
        number += 1
        candidate = Path("runs") / f"{name}-{number}"
    return candidate


def _run(settings, data, extra, resume, overwrite, as_json, quiet):
    import yaml

    from keras_emr.training.callbacks import Interrupted, StopOnSignal, TrainingDiverged
    from keras_emr.training.run_folder import RunFolder, describe_environment
    from keras_emr_cli.build import classifier
    from keras_emr_cli.main import EXIT_FAILURE, EXIT_INTERRUPTED, fail
    from keras_emr_cli.progress import Reporter, warn_of_chance
    from keras_emr_cli.session import signals_to

    folder = RunFolder(settings.out)
    folder.check(resume, overwrite)
    if resume:
        _require_same_data(folder, data, extra)
    # Every setting is checked before a file is written.
    robust = classifier(settings, data, extra=extra)
    folder.prepare(overwrite)
    plain = _settled(settings).plain()
    plain.pop("out")
    folder.write_text(folder.config, yaml.safe_dump(plain, sort_keys=False))
    facts = {"backend": settings.backend, "seed": settings.seed, "split_seed": settings.split_seed}
    environment = describe_environment(**facts, data=data.name, data_sha256=data.fingerprint)
    if extra is not None:
        environment["extra_data_sha256"] = extra.fingerprint
    folder.write_json(folder.environment, environment)
    stop = StopOnSignal()
    try:
        with Reporter(quiet) as reporter, signals_to(stop):
            runs = _train_all(settings, data, extra, folder, robust, resume, stop, reporter)
            for title, run in runs.items():
                warn_of_chance(title, run.history, data.classes)
            results = _judge(settings, data, runs, reporter, stop)
    except TrainingDiverged as error:
        kept = f"The last good epoch is in {folder.last}."
        if not folder.last.exists():
            kept = "No epoch was finished, so no model was kept."
        return fail(f"{error} {kept}", EXIT_FAILURE)
    except Interrupted as error:
        number = signal.Signals(error.signal_number)
        code = EXIT_INTERRUPTED if number == signal.SIGINT else 75
        return fail(
            f"interrupted ({number.name}); weights in {folder.last}; continue with: "
            f"keras-emr train --out {folder.path} --resume",
            code,
        )
    report = {"run": str(folder.path), "settings": plain, **environment, "results": results}
    folder.write_json(folder.report, report)
    _show(report, settings, as_json)
    return 0


def _require_same_data(folder, data, extra):
    now = {"data": (data.name, data.fingerprint)}
    if extra is not None:
        now["extra_data"] = ("extra data", extra.fingerprint)
    for field, (name, fingerprint) in now.items():
        trained_on = folder.read_environment().get(f"{field}_sha256")
        if trained_on != fingerprint:
            raise UserError(
                f"{field}: a resumed run needs the data it began with. Received: {name!r} with "
                f"SHA-256 {fingerprint[:12]}, the run has {str(trained_on)[:12]}. Train anew in "
                "another --out."
            )


def _train_all(settings, data, extra, folder, robust, resume, stop, reporter):
    """The asked-for run, then its baseline: ``{title: TrainedRun}``."""
    from keras_emr.training.experiment import train
    from keras_emr_cli.build import classifier, mixing, overfitting_guard, steps_per_epoch
    from keras_emr_cli.progress import EpochReport

    jobs = [(_title(settings), robust, folder.path)]
    if settings.baseline and settings.defense != "standard":
        jobs.append(("standard", None, folder.baseline))
    runs = {}
    for title, model, path in jobs:
        standard = model is None
        model = model or classifier(settings, data, standard=True)
        steps = steps_per_epoch(settings, data, standard)
        runs[title] = train(
            model,
            data,
            path,
            epochs=settings.epochs,
            batch_size=settings.batch_size,
            seed=settings.seed,
            resume=resume,
            stop=stop,
            callbacks=[EpochReport(reporter, title, settings.epochs, steps)],
            maximizer_warmup=settings.maximizer_warmup if model.maximizer is not None else 0,
            patience=settings.early_stopping,
            overfitting_guard=overfitting_guard(settings),
            augment=settings.augment,
            extra=extra,
            mixing=mixing(settings, data),
        )
    return runs


def _title(settings):
    emr = settings.emr > 0 or settings.emr_preset
    learned = settings.attack in TRAINED_ATTACKS and settings.defense != "standard"
    return " + ".join([settings.defense, *([settings.attack] * learned), *(["EMR"] * bool(emr))])


def _judge(settings, data, runs, reporter, stop):
    """Attack the best checkpoint of every run, and the last of the asked-for one, on test data."""
    import keras

    from keras_emr.attacks.pgd import PGD
    from keras_emr.evaluation.scorecard import scorecard
    from keras_emr.training.callbacks import Interrupted

    attack = PGD(
        float(settings.epsilon),
        settings.norm,
        steps=settings.eval_steps,
        restarts=settings.eval_restarts,
    )
    results = []
    for title, run in reversed(runs.items()):
        best = run.best["epoch"]
        checkpoints = [("best", best, run.folder.best)]
        if title == _title(settings) and best != len(run.history):
            checkpoints.append(("last", len(run.history), run.folder.last))
        for which, epoch, path in checkpoints:
            bar = reporter.steps(f"attack {title} ({which})")

            def progress(done, total, bar=bar):
                if stop.requested is not None:
                    raise Interrupted(stop.requested)
                bar(done, total)

            model = keras.saving.load_model(path)
            card = scorecard(
                model, attack, data.x_test, data.y_test, seed=settings.seed, progress=progress
            )
            results.append(
                {
                    "model": title,
                    "checkpoint": which,
                    "epoch": epoch,
                    "chosen_by": run.monitor if which == "best" else None,
                    "train_seconds": round(run.seconds, 1),
                    **card,
                }
            )
    return results


def _show(report, settings, as_json):
    if as_json:
        click.echo(json.dumps(report, indent=2))
        return
    from keras_emr_cli.tables import figure, percent, print_table

    attack = f"PGD-{settings.eval_steps}x{settings.eval_restarts}"
    columns = ["model", "checkpoint", "clean", attack, "margin L2", "margin Linf"]
    columns += ["margin > eps", "train s", "attack s"]
    rows = [
        [
            r["model"],
            f"{r['checkpoint']} (epoch {r['epoch']})",
            percent(r["accuracy"]),
            percent(r["robust_accuracy"]),
            figure(r["margins"]["effective_margin_l2"], 3),
            figure(r["margins"]["effective_margin_linf"], 4),
            percent(r["margins"]["share_above_epsilon"]),
            f"{r['train_seconds']:.0f}",
            f"{r['seconds']:.0f}",
        ]
        for r in report["results"]
    ]
    n = report["results"][0]["n"]
    print_table(columns, rows)
    click.echo(
        f"{settings.data}: {n} test images; {settings.norm}, epsilon {settings.epsilon}; "
        f"seed {settings.seed}; {settings.backend} {report['versions'][settings.backend]}; "
        "best chosen on validation data."
    )
    click.echo(
        f"{attack} accuracy is an upper bound of robust accuracy; margins are first-order, in "
        "[0, 1] units."
    )
    click.echo(f"run: {report['run']}")
