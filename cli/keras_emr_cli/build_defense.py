"""From settings to the defense. Imports keras: call it after ``select_backend``."""

from __future__ import annotations

from keras_emr.defenses import get_defense
from keras_emr.errors import UserError
from keras_emr_cli.defense_settings import WITH_MARGIN, mail_burn_in


def number(ratio):
    return None if ratio is None else float(ratio)


def mma_margin(s):
    """The margin wanted of every example: as set, else the published 1.5 epsilon."""
    return 1.5 * float(s.epsilon) if s.mma_margin is None else float(s.mma_margin)


def logit_margin(s, method):
    """What the loss of defense ``method`` takes off the logit of the true class."""
    margin = s.angular_margin
    if margin is None:
        margin = 0.2 if s.head == "hypersphere" and method in WITH_MARGIN else 0.0
    if margin and method not in WITH_MARGIN:
        raise UserError(
            f"angular_margin: the loss of {method} has none. Received: {margin:g}. Expected 0, or "
            f"defense {', '.join(WITH_MARGIN)}."
        )
    return s.head_scale * margin


def defense(s, examples=0):
    """The defense; ``examples``: of the training data, extra data included."""
    options = {}
    if s.beta is not None and s.defense not in ("standard", "at", "mma", "free-at"):
        options["beta"] = s.beta
    if margin := logit_margin(s, s.defense):
        options["logit_margin"] = margin
    if s.defense == "free-at":
        options |= {"batch_size": s.batch_size, "replays": s.replays}
    if s.defense == "mma":
        share = 1 / 3 if s.clean_weight is None else s.clean_weight
        options |= {"clean_weight": share, "examples": examples, "trials": s.mma_trials}
        options["smallest"] = number(s.mma_smallest)
    if s.defense == "at":
        gat = 0.5 if s.attack == "gat" else 0.0
        options["clean_weight"] = gat if s.clean_weight is None else s.clean_weight
    if s.defense.startswith("mail-"):
        options |= {
            "slope": s.mail_slope,
            "bias": s.mail_bias,
            "normalization": s.mail_normalization,
            "margin": s.mail_margin,
            "burn_in": mail_burn_in(s),
        }
    if s.label_smoothing:
        if s.defense in ("mart", "mma", "lbgat"):
            raise UserError(
                f"label_smoothing: the loss of {s.defense} has no smoothed form. Received: "
                f"label_smoothing={s.label_smoothing:g}. Leave it out."
            )
        options["label_smoothing"] = s.label_smoothing
    return get_defense(s.defense, **options)
