"""Classifiers from [0, 1] images to logits, made of plain Keras layers only."""

from keras_emr.models.registry import (
    ACTIVATIONS,
    LEAKY_SLOPE,
    MODEL_NAMES,
    MODELS,
    NORMALIZATIONS,
    check_model_name,
    make_model,
)

__all__ = [
    "ACTIVATIONS",
    "LEAKY_SLOPE",
    "MODELS",
    "MODEL_NAMES",
    "NORMALIZATIONS",
    "check_model_name",
    "make_model",
]
