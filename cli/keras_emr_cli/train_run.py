"""A run of ``keras-emr train``: the asked-for model, its baseline, and what they are worth."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import click

from keras_emr.attacks import TRAINED_ATTACKS
from keras_emr.errors import NotWritten, UserError
from keras_emr_cli.distributed import PLACE
from keras_emr_cli.settled import settled


def run(settings, data, extra, resume, overwrite, as_json, quiet, group, leave):
    from keras_emr.training.callbacks import Interrupted, StopOnSignal, TrainingDiverged
    from keras_emr.training.run_folder import RunFolder
    from keras_emr_cli.build import classifier
    from keras_emr_cli.main import EXIT_FAILURE, EXIT_INTERRUPTED, EXIT_RESUMABLE, fail
    from keras_emr_cli.progress import warn_of_chance
    from keras_emr_cli.reporter import Reporter
    from keras_emr_cli.session import signals_to

    folder = RunFolder(settings.out)
    folder.check(resume, overwrite)
    main_process = group is None or group.main
    if group is not None:
        group.check_batch(min(settings.batch_size, len(data.x_train)))
    if resume:
        _require_same_data(folder, data, extra)
    # Every setting is checked before a file is written.
    robust = classifier(settings, data, extra=extra)
    folder.prepare(overwrite)
    plain, environment = describe(folder, settings, data, extra)
    stop = StopOnSignal()
    try:
        with Reporter(quiet) as reporter, signals_to(stop):
            runs = _train_all(settings, data, extra, folder, robust, resume, stop, reporter)
            leave()
            if not main_process:
                return 0
            for title, run in runs.items():
                warn_of_chance(title, run.history, data.classes)
            results = _judge(settings, data, runs, reporter, stop)
    except TrainingDiverged as error:
        kept = f"The last good epoch is in {folder.last}."
        if not main_process:
            return EXIT_FAILURE
        if not folder.last.exists():
            kept = "No epoch was finished, so no model was kept."
        return fail(f"{error} {kept}", EXIT_FAILURE)
    except NotWritten as error:
        again = f"keras-emr train --out {folder.path} --resume"
        return fail(f"{error} Make room, then continue with: {again}", EXIT_FAILURE)
    except Interrupted as error:
        number = signal.Signals(error.signal_number)
        code = EXIT_INTERRUPTED if number == signal.SIGINT else EXIT_RESUMABLE
        if not main_process:
            return code
        at = f" at {error.where}" if error.where else ""
        return fail(
            f"interrupted ({number.name}){at}; weights in {folder.last}; continue with: "
            f"keras-emr train --out {folder.path} --resume",
            code,
        )
    report = {"run": str(folder.path), "settings": plain, **environment, "results": results}
    folder.write_json(folder.report, report)
    _show(report, settings, as_json)
    return 0


def describe(folder, s, data, extra):
    """Write the files by which ``evaluate`` and ``train --config`` know a run; their contents."""
    import yaml

    from keras_emr.training.run_folder import describe_environment

    plain = settled(s).plain()
    for name in ("out", *PLACE):
        plain.pop(name)
    facts = {"backend": s.backend, "seed": s.seed, "split_seed": s.split_seed}
    facts |= {"data": data.name, "data_sha256": data.fingerprint}
    if extra is not None:
        facts["extra_data_sha256"] = extra.fingerprint
    environment = describe_environment(**facts)
    folder.write_text(folder.config, yaml.safe_dump(plain, sort_keys=False))
    folder.write_json(folder.environment, environment)
    return plain, environment


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
    from keras_emr_cli.build import classifier, steps_per_epoch
    from keras_emr_cli.progress import EpochReport

    jobs = [(_title(settings), robust, folder.path)]
    if settings.baseline and settings.defense != "standard":
        jobs.append(("standard", None, folder.baseline))
    runs = {}
    for title, model, path in jobs:
        standard = model is None
        model = model or classifier(settings, data, standard=True)
        steps = steps_per_epoch(settings, data, standard)
        runs[title] = train_run(
            settings,
            data,
            extra,
            model,
            path,
            resume=resume,
            stop=stop,
            callbacks=[EpochReport(reporter, title, settings.epochs, steps)],
        )
    return runs


def train_run(settings, data, extra, model, path, *, resume, stop, callbacks, **changes):
    """Train ``model`` as ``settings`` say, in the run folder ``path``.

    Args:
        changes: arguments of :func:`keras_emr.training.experiment.train` to be other than that.
    """
    from keras_emr.training.experiment import train
    from keras_emr_cli.build import mixing, overfitting_guard
    from keras_emr_cli.progress import warn

    if settings.tensorboard:
        callbacks = [*callbacks, _tensorboard(path, resume, changes.pop("hparams", None))]
    options = {
        "epochs": settings.epochs,
        "batch_size": settings.batch_size,
        "seed": settings.seed,
        "maximizer_warmup": settings.maximizer_warmup if model.maximizer is not None else 0,
        "patience": settings.early_stopping,
        "overfitting_guard": overfitting_guard(settings),
        "augment": settings.augment,
        "extra": extra,
        "mixing": mixing(settings, data),
        "checkpoint_every": settings.checkpoint_every,
        "notify": warn,
    }
    return train(
        model, data, path, resume=resume, stop=stop, callbacks=callbacks, **{**options, **changes}
    )


def _tensorboard(path, resume, hparams):
    """The callback that writes ``path/tensorboard``, where a former run's curves go."""
    import shutil

    from keras_emr.training.tensorboard import TensorBoardLogger

    folder = Path(path) / "tensorboard"
    if not resume:
        shutil.rmtree(folder, ignore_errors=True)
    return TensorBoardLogger(folder, hparams)


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
