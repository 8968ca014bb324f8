"""Learned inner maximizers: small networks that turn input gradients into attack steps."""

import keras

from keras_emr.errors import UserError, unknown
from keras_emr.maximizers.generator import Generator
from keras_emr.maximizers.recurrent import LearnedMaximizer

# What a maximizer is made of, and the attack options that belong to its form.
_FORMS = {
    "lstm": (LearnedMaximizer, {"cell": "lstm"}, {}),
    "rnn": (LearnedMaximizer, {"cell": "rnn"}, {}),
    "generator-naive": (Generator, {"reads": "image"}, {"steps": 1}),
    "generator-gradient": (Generator, {"reads": "image_gradient"}, {"steps": 1}),
    "generator-multistep": (
        Generator,
        {"reads": "image_gradient"},
        {"steps": 2, "latent": True, "step_weights": "last"},
    ),
    "gat": (
        Generator,
        {"reads": "gradient", "power_penalty": 0.01},
        {"steps": 1, "objective": "probability"},
    ),
}


def make_maximizer(name, **options):
    """A fresh maximizer by its name. Raises :class:`UserError` for an unknown one."""
    if name not in _FORMS:
        raise unknown("maximizer", name, _FORMS)
    kind, defaults, _ = _FORMS[name]
    return kind(**{**defaults, **options})


def attack_options(name):
    """Options of :class:`LearnedAttack` that make it the method called ``name``."""
    if name not in _FORMS:
        raise unknown("maximizer", name, _FORMS)
    return dict(_FORMS[name][2])


def as_maximizer(maximizer):
    """A maximizer layer, or a fresh one from its name."""
    if isinstance(maximizer, str):
        return make_maximizer(maximizer)
    if not isinstance(maximizer, keras.layers.Layer) or not hasattr(maximizer, "initial_state"):
        raise UserError(
            f"maximizer must be a LearnedMaximizer, a Generator or one of {', '.join(_FORMS)}. "
            f"Received: {maximizer!r}."
        )
    return maximizer
