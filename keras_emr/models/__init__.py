"""Classifiers from [0, 1] images to logits, made of plain Keras layers only."""

from keras_emr.registry import Registry

MODELS = Registry(
    "model",
    {
        "small-cnn": "keras_emr.models.small_cnn:small_cnn",
        "mlp": "keras_emr.models.mlp:mlp",
    },
)
