"""Attacks (inner maximisation), one per file, for training and for evaluation alike."""

from keras_emr.registry import Registry

ATTACKS = Registry(
    "attack",
    {
        "pgd": "keras_emr.attacks.pgd:PGD",
        "bim": "keras_emr.attacks.bim:BIM",
        "fgsm": "keras_emr.attacks.fgsm:FGSM",
        "mi-fgsm": "keras_emr.attacks.mi_fgsm:MIFGSM",
        "apgd": "keras_emr.attacks.apgd:APGD",
        "apgd-t": "keras_emr.attacks.apgd_targeted:APGDTargeted",
        "deepfool": "keras_emr.attacks.deepfool:DeepFool",
        "cw-l2": "keras_emr.attacks.carlini_wagner:CarliniWagner",
        "fab": "keras_emr.attacks.fab:FAB",
        "fab-t": "keras_emr.attacks.fab:FABTargeted",
        "line-search": "keras_emr.attacks.line_search:LineSearch",
        "square": "keras_emr.attacks.square:Square",
        "nes": "keras_emr.attacks.nes:NES",
        "spsa": "keras_emr.attacks.spsa:SPSA",
        "hopskipjump": "keras_emr.attacks.hop_skip_jump:HopSkipJump",
        "boundary": "keras_emr.attacks.boundary:BoundaryAttack",
        "sign-opt": "keras_emr.attacks.sign_opt:SignOPT",
        "learned": "keras_emr.attacks.learned:LearnedAttack",
        "transfer": "keras_emr.attacks.transfer:Transfer",
    },
)

# Those that run inside a training step.
TRAINING_ATTACKS = ("pgd", "bim", "fgsm", "mi-fgsm", "apgd", "line-search")

# Methods that train their maximizer: `LearnedAttack.named`.
TRAINED_ATTACKS = (
    "lstm",
    "rnn",
    "generator-naive",
    "generator-gradient",
    "generator-multistep",
    "gat",
)
