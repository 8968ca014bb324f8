"""keras_emr: adversarially robust image classifiers for Keras 3.

Names are loaded on first use, so that ``import keras_emr`` (and the command line's ``--help``)
does not pay for importing keras and a backend.
"""

from __future__ import annotations

import importlib
import sys

from keras_emr._version import __version__ as __version__

_HOME = {
    "RobustClassifier": "keras_emr.training.classifier",
    "train": "keras_emr.training.experiment",
    "distribute": "keras_emr.distribution",
    "FGSM": "keras_emr.attacks.fgsm",
    "BIM": "keras_emr.attacks.bim",
    "PGD": "keras_emr.attacks.pgd",
    "APGD": "keras_emr.attacks.apgd",
    "LineSearch": "keras_emr.attacks.line_search",
    "LearnedAttack": "keras_emr.attacks.learned",
    "LearnedMaximizer": "keras_emr.maximizers.recurrent",
    "Generator": "keras_emr.maximizers.generator",
    "Standard": "keras_emr.defenses.standard",
    "AdversarialTraining": "keras_emr.defenses.adversarial_training",
    "TRADES": "keras_emr.defenses.trades",
    "MART": "keras_emr.defenses.mart",
    "MAIL": "keras_emr.defenses.mail",
    "MMA": "keras_emr.defenses.mma",
    "LBGAT": "keras_emr.defenses.lbgat",
    "FreeAdversarialTraining": "keras_emr.defenses.free",
    "EffectiveMarginRegularizer": "keras_emr.regularizers.effective_margin",
    "AutoAttack": "keras_emr.evaluation.autoattack",
    "evaluate_attack": "keras_emr.evaluation.robust_accuracy",
    "effective_margins": "keras_emr.evaluation.margins",
    "margin_summary": "keras_emr.evaluation.margins",
    "EffectiveMarginLogger": "keras_emr.training.callbacks",
    "load_data": "keras_emr.data.registry",
    "EMA": "keras_emr.training.averaging",
    "SWA": "keras_emr.training.averaging",
    "AWP": "keras_emr.training.weight_perturbation",
    "make_model": "keras_emr.models.registry",
    "hypersphere_head": "keras_emr.models.hypersphere",
    "mlp": "keras_emr.models.mlp",
    "small_cnn": "keras_emr.models.small_cnn",
    "UserError": "keras_emr.errors",
}
_RENAMED = {"load_data": "load"}

__all__ = sorted([*_HOME, "__version__"])


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module 'keras_emr' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), _RENAMED.get(name, name))
    globals()[name] = value
    return value


def __dir__():
    return __all__


if "keras" in sys.modules:
    # No import is saved then, and saved classifiers can be loaded: `keras.saving.load_model`
    # finds registered classes only after they were imported.
    importlib.import_module("keras_emr.training.classifier")
