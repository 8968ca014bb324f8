"""``keras-emr tune``: a search over the options of ``train`` for robust accuracy."""

from __future__ import annotations

from pathlib import Path

import click

from keras_emr.errors import UserError
from keras_emr_cli.presets import PRESETS
from keras_emr_cli.settings import Merged, merge, options
from keras_emr_cli.tune_search import address, stored_settings
from keras_emr_cli.tune_settings import KEYS, TUNE

# What may change when a search is resumed; by the rest its trials are comparable.
_RESUMABLE = {"max_trials", "finalists", "final_attack", "eval_steps", "eval_restarts", "workers"}
_RESUMABLE |= {"chief", "restarts_per_worker", "worker_timeout", "out", "stream", "tfds_dir"}
_RESUMABLE |= {"space", "tensorboard", "baseline", "val_steps", "checkpoint_every"}


@click.command(name="tune")
@click.option(
    "--config",
    metavar="FILE",
    help="YAML file of fixed settings (`keras-emr config init`), or recipe:NAME.",
)
@click.option("--resume", is_flag=True, help="Go on with the search in --out.")
@click.option("--overwrite", is_flag=True, help="Replace the search in --out.")
@click.option(
    "--tuner-id",
    metavar="NAME",
    help="Join the search in --out as a worker of this name (needs --chief). "
    "chief: serve workers of other hosts.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
@click.option("--quiet", is_flag=True, help="No progress on stderr.")
@options(TUNE)
def command(config, resume, overwrite, tuner_id, as_json, quiet, **flags):
    """Search the options of `train` that a space file names; all others are fixed.

    Each trial is a run folder in OUT/trials, judged on validation data by a cheap attack; the
    finalists are judged anew by a strong one. Exit code 75: interrupted; `tune --out OUT --resume`
    goes on inside the trial that was under way.

    Workers on other hosts that share OUT join with: tune --out OUT --chief HOST:PORT --tuner-id
    NAME.
    """
    if resume and overwrite:
        raise click.UsageError("--resume and --overwrite exclude each other")
    if tuner_id is not None and flags["chief"] is None:
        raise click.UsageError("--tuner-id needs --chief HOST:PORT")
    if tuner_id not in (None, "chief"):
        from keras_emr_cli.tune_workers import work

        return work(flags, tuner_id, quiet)
    settings, space, text = _settings(flags, config, resume)
    from keras_emr_cli.tune_run import run

    return run(settings, space, text, tuner_id == "chief", resume, overwrite, as_json, quiet)


def _settings(flags, config, resume):
    from keras_emr_cli.tune_space import read_space

    before = stored = None
    if resume:
        if flags["out"] is None:
            raise click.UsageError("--resume needs --out FOLDER")
        stored = Path(flags["out"]) / "config.yaml"
        if stored.exists():
            config = config or str(stored)
            before, space, text = stored_settings(flags["out"])
    settings = merge(KEYS, flags, config, presets=PRESETS)
    if before is None or settings.origins["space"] == "flag":
        if settings.space is None:
            raise UserError(
                "--space: no file of what is searched. Received: nothing. Print an example with: "
                "keras-emr config space."
            )
        given, its_text = read_space(settings.space)
        if before is not None and given != space:
            raise UserError(
                f"--space: a resumed search keeps its space. Received: {settings.space!r}, which "
                "is another one. Leave it out, or search anew in another --out."
            )
        space, text = given, its_text
    _check(settings, space)
    if before is not None:
        _require_same(settings, before)
    if settings.out is None:
        settings = Merged({**settings.values, "out": str(_fresh())}, settings.origins)
    return settings, space, text


def _check(s, space):
    """Whatever contradicts itself, before anything is loaded."""
    searched = {parameter.name for parameter in space}
    if s.search == "hyperband" and "epochs" in searched:
        raise UserError(
            "space: hyperband itself gives out epochs, up to --epochs. Received: epochs in the "
            "space. Leave it out, or use --search random or bayesian."
        )
    for name in searched:
        if s.origins[name] in ("flag", "environment"):
            raise UserError(
                f"{name}: both fixed and searched. Received: {s.plain()[name]} by "
                f"{'its flag' if s.origins[name] == 'flag' else 'its environment variable'}, and "
                "an entry in the space. Leave one of the two out."
            )
    for name, judge in (("epsilon", s.judge_epsilon), ("norm", s.judge_norm)):
        if name in searched and judge is None:
            raise UserError(
                f"--judge-{name}: trials that train with another {name} each must be judged in one "
                f"ball. Received: {name} in the space. Give --judge-{name}."
            )
    if s.distribute != "none":
        raise UserError(
            "distribute: a trial is trained on one device. Received: --distribute "
            f"{s.distribute}. Leave it out; --workers N runs N trials at a time."
        )
    if s.workers and s.search != "hyperband" and s.max_trials and s.workers > s.max_trials:
        raise UserError(
            f"--workers: more than trials. Received: {s.workers} for {s.max_trials} trials."
        )
    if s.chief is not None:
        address(s.chief)
    from keras_emr_cli.session import require_tensorboard, require_tuner

    require_tuner(s.search)
    if s.tensorboard:
        require_tensorboard()


def _require_same(settings, before):
    from keras_emr_cli.settled import settled

    had, now, old = before.plain(), settled(settings), settled(before)
    for name, value in settings.plain().items():
        if name not in _RESUMABLE and now.values[name] != old.values[name]:
            raise UserError(
                f"{name}: a resumed search keeps its settings. Received: {value}, the search has "
                f"{had[name]}. Leave it out, or search anew in another --out."
            )


def _fresh():
    candidate, number = Path("runs") / "search", 1
    while candidate.exists():
        number += 1
        candidate = Path("runs") / f"search-{number}"
    return candidate
