"""Attacks (inner maximisation), one per file, for training and for evaluation alike."""

from keras_emr.registry import Registry

ATTACKS = Registry(
    "attack",
    {
        "pgd": "keras_emr.attacks.pgd:PGD",
        "bim": "keras_emr.attacks.bim:BIM",
        "fgsm": "keras_emr.attacks.fgsm:FGSM",
        "apgd": "keras_emr.attacks.apgd:APGD",
        "line-search": "keras_emr.attacks.line_search:LineSearch",
        "learned": "keras_emr.attacks.learned:LearnedAttack",
    },
)

# Methods that train their maximizer: `LearnedAttack.named`.
TRAINED_ATTACKS = (
    "lstm",
    "rnn",
    "generator-naive",
    "generator-gradient",
    "generator-multistep",
    "gat",
)
