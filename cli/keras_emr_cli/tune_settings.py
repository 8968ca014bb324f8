"""Every option of ``keras-emr tune``: those of the search, and those of ``train`` as fixed ones."""

from __future__ import annotations

from keras_emr.tuning import OBJECTIVES, SEARCHES
from keras_emr_cli.settings import NORMS, grouped
from keras_emr_cli.settings import Setting as S
from keras_emr_cli.train_settings import TRAIN

SEARCH = [
    *grouped(
        "search",
        S("search", "choice", "random", "Who proposes the trials.", SEARCHES),
        S(
            "space",
            "text",
            None,
            "YAML file of what is searched (`keras-emr config space` prints an example).",
            auto="required",
        ),
        S("objective", "choice", OBJECTIVES[0], "What is maximised.", OBJECTIVES),
        S(
            "max_trials",
            "int",
            None,
            "Trials at most.",
            low=1,
            auto="20; with hyperband all of its brackets",
        ),
        S("factor", "int", 3, "Hyperband: one in so many trials goes on to more epochs.", low=2),
        S("iterations", "int", 1, "Hyperband: how often all brackets are run.", low=1),
        S("prune_steps", "int", 5, "PGD steps of the validation attack during trials.", low=1),
        S(
            "stopping",
            "choice",
            None,
            "End hopeless trials early: the median stopping rule.",
            ("median", "none"),
            auto="median; none with hyperband, which ends them itself",
        ),
        S("stopping_after", "int", 3, "Epochs that the rule leaves every trial.", low=1),
        S(
            "judge_epsilon",
            "ratio",
            None,
            "Radius of the ball in which all trials are judged.",
            low=0,
            auto="--epsilon; required where epsilon is searched",
        ),
        S(
            "judge_norm",
            "choice",
            None,
            "Norm of that ball.",
            NORMS,
            auto="--norm; required where norm is searched",
        ),
        S("finalists", "int", 3, "Trials that the strong attack judges anew; 0: none.", low=0),
        S(
            "final_attack",
            "choice",
            "pgd",
            "The strong attack, on validation data; pgd: --eval-steps, --eval-restarts.",
            ("pgd", "autoattack"),
        ),
    ),
    *grouped(
        "processes",
        S("workers", "int", 0, "Worker processes on this machine; 0: none but this.", low=0),
        S(
            "chief",
            "text",
            None,
            "HOST:PORT of the chief: to listen on, or with --tuner-id to join.",
            auto="a free port of this machine's loopback",
        ),
        S("restarts_per_worker", "int", 3, "How often a crashed worker is started again.", low=0),
        S(
            "worker_timeout",
            "float",
            300.0,
            "Seconds that a chief without workers of its own waits for the first to join.",
            low=1,
        ),
    ),
]
# Of `train`, without meaning here: trials have --prune-steps, no baseline, no test set; what a
# preset sets can be given, or searched.
UNUSED = ("preset", "val_steps", "baseline", "out")
TUNE = [
    *SEARCH,
    *(setting for setting in TRAIN if setting.name not in UNUSED),
    S("out", "text", None, "Folder of the search.", auto="a new folder under runs/"),
]
# What config files may say: a config of `train` or a recipe is one.
KEYS = [*TUNE, *(setting for setting in TRAIN if setting.name in UNUSED and setting.name != "out")]
