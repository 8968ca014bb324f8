"""Defenses (outer losses), one method per file."""

from keras_emr.registry import Registry

DEFENSES = Registry(
    "defense",
    {
        "standard": "keras_emr.defenses.standard:Standard",
        "at": "keras_emr.defenses.adversarial_training:AdversarialTraining",
        "trades": "keras_emr.defenses.trades:TRADES",
        "mart": "keras_emr.defenses.mart:MART",
        "mail-at": "keras_emr.defenses.mail:MAIL",
        "mail-trades": "keras_emr.defenses.mail:MAIL",
        "mail-mart": "keras_emr.defenses.mail:MAIL",
        "mma": "keras_emr.defenses.mma:MMA",
        "lbgat": "keras_emr.defenses.lbgat:LBGAT",
        "free-at": "keras_emr.defenses.free:FreeAdversarialTraining",
    },
)


def get_defense(name, **options):
    """The defense called ``name`` on the command line.

    Raises :class:`UserError` for an unknown name.
    """
    defense = DEFENSES.get(name)
    if name.startswith("mail-"):
        options["base"] = name.removeprefix("mail-")
    return defense(**options)
