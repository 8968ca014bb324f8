"""A search as each of its processes knows it: address, settings, what runs trials, last line."""

from __future__ import annotations

import signal
from pathlib import Path

from keras_emr.errors import UserError
from keras_emr_cli.settings import merge
from keras_emr_cli.tune_settings import KEYS


def address(text):
    """``HOST:PORT`` as a pair."""
    host, colon, port = text.rpartition(":")
    if not colon or not host or not port.isdigit() or int(port) > 65535:
        raise UserError(f"--chief: not an address. Received: {text!r}. Expected HOST:PORT.")
    return host, int(port)


def stored_settings(out):
    """The settings and the space of the search in folder ``out``."""
    from keras_emr_cli.tune_space import read_space

    out = Path(out)
    settings = merge(KEYS, {"out": str(out)}, str(out / "config.yaml"), environment={})
    return settings, *read_space(str(out / "space.yaml"))


def runner(settings, folder, data, stop, reporter):
    """What runs trials, in any process."""
    from keras_emr.tuning.stopping import MedianRule
    from keras_emr.tuning.trials import TrialRunner
    from keras_emr_cli.tune_trial import TrainTrial

    stopping = settings.stopping or ("none" if settings.search == "hyperband" else "median")
    rule = MedianRule(folder.trials, settings.stopping_after) if stopping == "median" else None
    train = TrainTrial(settings, data, stop, reporter)
    return TrialRunner(folder.trials, train, settings.objective, rule, folder.errors)


def interrupted(number, folder):
    """The last line and the exit code of a search that a signal ended."""
    from keras_emr_cli.main import EXIT_INTERRUPTED, EXIT_RESUMABLE, fail

    name = signal.Signals(number)
    code = EXIT_INTERRUPTED if name == signal.SIGINT else EXIT_RESUMABLE
    text = f"interrupted ({name.name}); continue with: keras-emr tune --out {folder} --resume"
    return fail(text, code)
