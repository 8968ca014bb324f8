"""``keras-emr train``: train, compare with a standard model, keep the run."""

from __future__ import annotations

import re
from pathlib import Path

import click

from keras_emr.attacks import TRAINED_ATTACKS
from keras_emr.errors import UserError
from keras_emr_cli import distributed
from keras_emr_cli.distributed import PLACE
from keras_emr_cli.load_data import load_data, load_extra
from keras_emr_cli.presets import PRESETS
from keras_emr_cli.settings import Merged, merge, options
from keras_emr_cli.settled import settled
from keras_emr_cli.train_settings import TRAIN

# What may change when a run is resumed; the rest is fixed by its checkpoint.
# `stream` and `tfds_dir` do not change what is read, which has a hash.
_RESUMABLE = {"epochs", "eval_steps", "eval_restarts", "baseline", "out", "stream", "tfds_dir"}
_RESUMABLE |= {"early_stopping", "overfitting_guard", "checkpoint_every", "tensorboard"}
_RESUMABLE |= {"distribute", "devices", *PLACE}  # the numbers do not depend on them
# Taken from the run where they are `auto`: what more epochs would make of them is another run.
_OF_THE_RUN = ("mail_burn_in", "awp_warmup", "averaging_start")


@click.command(name="train")
@click.option(
    "--config",
    metavar="FILE",
    help="YAML file of settings (`keras-emr config init`), or recipe:NAME (`config recipes`).",
)
@click.option("--resume", is_flag=True, help="Continue the run in --out at the step it stopped at.")
@click.option("--overwrite", is_flag=True, help="Replace the run in --out.")
@click.option(
    "--dry-run", is_flag=True, help="Print what the run would need, by a few steps; write nothing."
)
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
@click.option("--quiet", is_flag=True, help="No progress on stderr.")
@options(TRAIN)
def command(config, resume, overwrite, dry_run, as_json, quiet, **flags):
    """Train a robust classifier and compare it with a standard one.

    Without options: TRADES with effective margin regularization on the embedded digits.
    """
    settings = _settings(flags, config, resume, overwrite)
    from keras_emr_cli.session import require_tensorboard, select_backend

    if settings.tensorboard:
        require_tensorboard()
    distributed.check(settings)
    select_backend(settings.backend)
    if count := distributed.processes_to_start(settings):
        switches = _switches(config, resume, overwrite, dry_run, as_json, quiet)
        return distributed.start_processes(count, TRAIN, {**flags, "out": settings.out}, switches)
    with distributed.joined(settings, quiet) as (group, leave):
        quiet = quiet or (group is not None and not group.main)
        data = load_data(settings, settings.validation, quiet)
        extra = load_extra(settings, data)
        if dry_run:
            return _dry_run(settings, data, extra, resume, overwrite, as_json, group)
        from keras_emr_cli.train_run import run

        with distributed.own_folder(group, settings) as own:
            return run(own, data, extra, resume, overwrite, as_json, quiet, group, leave)


def _dry_run(settings, data, extra, resume, overwrite, as_json, group):
    from keras_emr.training.run_folder import RunFolder
    from keras_emr_cli import dry_run
    from keras_emr_cli.build import classifier

    RunFolder(settings.out).check(resume, overwrite)
    if group is not None:
        group.check_batch(min(settings.batch_size, len(data.x_train)))
    robust = classifier(settings, data, extra=extra)
    found = dry_run.describe(settings, data, extra, robust, group)
    if group is None or group.main:
        dry_run.show(found, as_json)
    return 0


def _switches(config, *given):
    names = ("--resume", "--overwrite", "--dry-run", "--json", "--quiet")
    chosen = [name for name, on in zip(names, given, strict=True) if on]
    return [*chosen, *(["--config", config] if config else [])]


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
    settings = merge(TRAIN, flags, config, presets=PRESETS)
    if stored is not None and stored.exists():
        before = settled(merge(TRAIN, {}, str(stored), environment={}))
        kept = {n: before.values[n] for n in _OF_THE_RUN if settings.values[n] is None}
        settings = Merged({**settings.values, **kept}, settings.origins)
        had, now = before.plain(), settled(settings)
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
