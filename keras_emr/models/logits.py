"""Refuse models that end in probabilities: attacks and margins need logits."""

import keras
import numpy as np
from keras import ops

from keras_emr.errors import UserError
from keras_emr.network import full_precision

_SQUASHING = ("softmax", "sigmoid", "log_softmax", "softplus", "hard_sigmoid", "sparsemax")
_FIX = (
    "Make the last layer linear (activation=None); take the softmax of the output when predicting"
)


def _last_layer(model):
    """The layer that makes the output of a Sequential or Functional model, however nested."""
    while isinstance(model, keras.Model) and getattr(model, "layers", None):
        output = getattr(model, "outputs", None)
        history = getattr(output[0], "_keras_history", None) if output else None
        model = history.operation if history is not None else model.layers[-1]
    return model


def require_logits(model):
    """Check that ``model`` is a classifier that ends in logits.

    Looks at the last layer, and, if the input shape is known, at the outputs for random images:
    rows that are non-negative and sum to one within 1e-5 are probabilities.

    Args:
        model: Keras model, (N, H, W, C) images to (N, K).

    Raises:
        UserError: the model ends in softmax or the like, or its output is not (N, K), K >= 2.
    """
    if not isinstance(model, keras.Model):
        raise UserError(f"model must be a keras.Model. Received: {type(model).__name__}.")
    outputs = getattr(model, "outputs", None) or [None]
    if len(outputs) != 1:
        raise UserError(
            "the model must give one logit per class, shape (N, K) with K >= 2. Received: "
            f"{len(outputs)} outputs. Make a model of the logits alone."
        )
    last = _last_layer(model)
    activation = getattr(getattr(last, "activation", None), "__name__", "")
    if isinstance(last, keras.layers.Softmax):
        activation = "softmax"
    if activation in _SQUASHING:
        raise UserError(
            f"the model must end in logits. Received: last layer {last.name!r} with "
            f"activation={activation!r}. {_FIX}."
        )
    shape = getattr(model, "input_shape", None) if model.built else None
    if not isinstance(shape, tuple) or any(side is None for side in shape[1:]):
        return
    images = np.random.default_rng(0).uniform(size=(4, *shape[1:])).astype("float32")
    with full_precision(model):  # probabilities sum to 1 only roughly in half precision
        output = model(images, training=False)
    if len(output.shape) != 2 or output.shape[-1] < 2:
        raise UserError(
            "the model must give one logit per class, shape (N, K) with K >= 2. Received: output "
            f"shape {tuple(output.shape)}. A binary classifier needs two outputs."
        )
    values = ops.convert_to_numpy(ops.cast(output, "float32"))
    if (values >= -1e-5).all() and np.allclose(values.sum(axis=-1), 1.0, atol=1e-5):
        raise UserError(
            "the model must end in logits. Received: outputs that are non-negative and sum to 1 "
            f"for every image, so probabilities. {_FIX}."
        )
