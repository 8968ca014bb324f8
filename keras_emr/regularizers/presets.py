"""EMR as the authors' released recipes set it (CIFAR-10, WRN-34-10, batch 128, [0, 1] inputs).

Read in the released code (commit c3e041c): lambda, temperature, reduction and decay epochs. The
same recipes use beta = 12 (TRADES), MAIL slope / bias 30 / -0.07 (AT) and 5 / 0.05 (TRADES), and
cross-entropy PGD-10 as TRADES's attack.
"""

from keras_emr.errors import unknown
from keras_emr.regularizers.schedules import StepDecay


def _released(weight, temperature, decay_epochs):
    return {
        "weight": weight,
        "temperature": temperature,
        "reduction": "released",
        "schedule": StepDecay(decay_epochs, 0.1),
    }


PRESETS = {
    "at-emr-released": _released(3.0, 40.0, [60, 90]),
    "trades-emr-released": _released(1.0, 1.0, [60, 120]),
    "mail-at-emr-released": _released(1.0, 0.1, [75, 90]),
    "mail-trades-emr-released": _released(1.0, 0.1, [75, 90]),
}


def preset_options(name):
    """Options of preset ``name``. Raises :class:`UserError` for an unknown one."""
    if name not in PRESETS:
        raise unknown("EMR preset", name, PRESETS)
    return PRESETS[name]
