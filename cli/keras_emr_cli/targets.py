"""The model and the data that a command is about: a run folder or a .keras file."""

from __future__ import annotations

from pathlib import Path

from keras_emr.errors import UserError, unknown
from keras_emr.models.loading import load_model as load_model
from keras_emr_cli.reading_settings import READING
from keras_emr_cli.settings import Merged, merge
from keras_emr_cli.train_settings import TRAIN


def resolve(target, checkpoint, settings):
    """The model file, the settings with the run's own where they were left open, and those."""
    if checkpoint not in (None, "best", "last"):
        raise unknown("checkpoint", checkpoint, ("best", "last"))
    run = {}
    path = target
    if target.is_dir():
        if not (target / "config.yaml").exists():
            raise UserError(f"not a run folder: no config.yaml. Received: {str(target)!r}.")
        run = merge(TRAIN, {}, str(target / "config.yaml"), environment={}).values
        path = target / f"{checkpoint or 'best'}.keras"
    elif checkpoint is not None:
        raise UserError(f"--checkpoint needs a run folder. Received: {str(target)!r}.")
    if not path.exists():
        raise UserError(f"model not found. Received: {str(path)!r}. Expected a run or .keras file.")
    return path, filled(settings, run, "a .keras file"), run


def filled(settings, run, what):
    """The settings with the run's own where they were left open.

    Args:
        settings: merged.
        run: those of a run, or empty.
        what: whatever it is that says nothing about data and epsilon, for the message.
    """
    values = dict(settings.values)
    if run and values["epsilon"] is None and values["norm"] not in (None, run["norm"]):
        raise UserError(
            f"--epsilon: the run's is for another norm. Received: --norm {values['norm']}, the run "
            f"has {run['norm']}, epsilon {run['epsilon']}. Give --epsilon."
        )
    # How to read belongs to the data: the run's way is not for others.
    reading = [setting.name for setting in READING] if values["data"] is None else []
    for name in ("data", "split_seed", "epsilon", "norm", *reading):
        if values[name] is None:
            values[name] = run.get(name)
    for name in ("data", "epsilon"):
        if values[name] is None:
            raise UserError(f"--{name}: {what} does not say it. Received: nothing. Give --{name}.")
    values["norm"] = values["norm"] or "linf"
    values["split_seed"] = values["split_seed"] or 0
    return Merged(values, settings.origins)


def require_same_data(target, data, settings):
    """The data that the run names must still be what the run was trained on."""
    from keras_emr.training.run_folder import RunFolder

    folder = RunFolder(target)
    try:
        trained_on = folder.read_environment()["data_sha256"]
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(
            f"run: cannot tell which data it was trained on. Received: {str(folder.environment)!r}."
            " Expected the run's environment.json; or give --data."
        ) from None
    if trained_on != data.fingerprint:
        raise UserError(
            f"data: not what the run was trained on. Received: {settings.data!r} with SHA-256 "
            f"{data.fingerprint[:12]}, the run has {str(trained_on)[:12]}. To evaluate on other "
            "data give --data explicitly."
        )


def model_file(text):
    """Path of the model that ``text`` names: a run's best, or the file itself."""
    path = Path(text)
    path = path / "best.keras" if path.is_dir() else path
    if not path.exists():
        raise UserError(f"model not found. Received: {str(path)!r}. Expected a run or .keras file.")
    return path
