"""The options of ``keras-emr train`` for the defense."""

from __future__ import annotations

from keras_emr.defenses import DEFENSES
from keras_emr.models import check_model_name
from keras_emr_cli.settings import Setting as S
from keras_emr_cli.settings import grouped

# Those whose loss takes a margin on the logit of the true class.
WITH_MARGIN = ("standard", "at", "free-at", "trades", "mart")


def mail_burn_in(s):
    """Unweighted epochs of MAIL: as set, else the released schedule's 76 of every 120 epochs."""
    return round(s.epochs * 76 / 120) if s.mail_burn_in is None else s.mail_burn_in


DEFENSE = [
    *grouped(
        "defense",
        S("defense", "choice", "trades", "Training method.", DEFENSES.names),
        S(
            "beta",
            "float",
            None,
            "Weight of the divergence (TRADES, MART, MAIL, LBGAT).",
            low=0,
            auto="6 for trades, 5 for mart and mail, 0 for lbgat",
        ),
        S(
            "clean_weight",
            "float",
            None,
            "Share of a clean term in the loss of at and mma.",
            low=0,
            high=0.999,
            auto="1/3 for mma, 0.5 for at with attack gat, else 0",
        ),
        S(
            "mail_slope",
            "float",
            None,
            "MAIL: slope of the instance weight.",
            auto="10 for mail-at, 2 for the others",
        ),
        S(
            "mail_bias",
            "float",
            None,
            "MAIL: margin at which the weight is one half.",
            auto="-0.5 for mail-at, 0 for the others",
        ),
        S(
            "mail_normalization",
            "choice",
            "constant",
            "MAIL: 3 w, or weights with batch mean 1.",
            ("constant", "batch"),
        ),
        S(
            "mail_margin",
            "choice",
            "adversarial",
            "MAIL: which probabilistic margin.",
            ("adversarial", "natural", "difference"),
        ),
        S(
            "mail_burn_in",
            "int",
            None,
            "MAIL: unweighted epochs at the start.",
            low=0,
            auto="76 of every 120 epochs",
        ),
        S(
            "teacher",
            "text",
            None,
            "LBGAT: the network that is trained with it, as --model takes them.",
            auto="as --model",
            check=check_model_name,
        ),
        S(
            "mma_margin",
            "ratio",
            None,
            "MMA: margin wanted of every example (d_max).",
            low=0,
            low_open=True,
            auto="1.5 epsilon",
        ),
        S(
            "mma_smallest",
            "ratio",
            None,
            "MMA: least radius of an attack.",
            low=0,
            auto="a tenth of --mma-margin",
        ),
        S("mma_trials", "int", 10, "MMA: bisections for the boundary.", low=1),
        S("replays", "int", 8, "Free AT: how often each batch of an epoch comes.", low=1),
    ),
]
