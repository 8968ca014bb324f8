"""What a run's settings come to: what ``auto`` means, and what ``config.yaml`` keeps."""

from __future__ import annotations

from pathlib import Path

from keras_emr_cli.defense_settings import mail_burn_in
from keras_emr_cli.settings import Merged

# With Adam's rate, SGD does not leave its start within a short run.
LEARNING_RATES = {"adam": 0.001, "sgd": 0.1}


def learning_rate(s):
    """The largest learning rate: as set, else the optimizer's own."""
    return LEARNING_RATES[s.optimizer] if s.learning_rate is None else s.learning_rate


def awp_warmup(s):
    """Epochs without AWP. A network that has learned nothing yet would be kept from beginning."""
    if s.awp_warmup is not None:
        return s.awp_warmup
    return 0 if s.defense == "at" else min(10, -(-s.epochs // 5))


def swa_start(s):
    """First epoch of SWA: as set, else after three quarters of the epochs."""
    return s.epochs * 3 // 4 + 1 if s.averaging_start is None else s.averaging_start


def settled(s) -> Merged:
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
    if s.averaging == "swa":
        values["averaging_start"] = swa_start(s)
    if s.awp:
        values["awp_warmup"] = awp_warmup(s)
    return Merged(values, s.origins)
