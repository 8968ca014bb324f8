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
    """The layer that makes the output of a Sequential or Functional model, however nested.

    ``None`` for a subclassed model: the layer assigned last need not be the one that comes last.
    """
    while isinstance(model, keras.Model):
        output = getattr(model, "outputs", None)
        history = getattr(output[0], "_keras_history", None) if output else None
        if history is not None:
            model = history.operation
        elif isinstance(model, keras.Sequential) and model.layers:
            model = model.layers[-1]
        else:
            return None
    return model


def require_logits(model, input_shape=None):
    """Check that ``model`` is a classifier that ends in logits.

    Looks at the last layer of a Sequential or Functional model, and, if the input shape is known,
    at the outputs for random images: rows that are non-negative and sum to one within 1e-5 are
    probabilities.

    Args:
        model: Keras model, (N, H, W, C) images to (N, K).
        input_shape: (H, W, C), for models that do not know theirs, or take images of any size.

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
    shape = _known(own_input_shape(model)) or _known(input_shape)
    if shape is None:
        return
    images = np.random.default_rng(0).uniform(size=(4, *shape)).astype("float32")
    with full_precision(model):  # probabilities sum to 1 only roughly in half precision
        output = model(images, training=False)
    if len(output.shape) != 2 or output.shape[-1] < 2:
        raise UserError(
            "the model must give one logit per class, shape (N, K) with K >= 2. Received: output "
            f"shape {tuple(output.shape)}. A binary classifier needs two outputs."
        )
    try:
        values = ops.convert_to_numpy(ops.cast(output, "float32"))
    except (TypeError, NotImplementedError):
        return  # inside a compiled step, where there are no values to look at
    if (values >= -1e-5).all() and np.allclose(values.sum(axis=-1), 1.0, atol=1e-5):
        raise UserError(
            "the model must end in logits. Received: outputs that are non-negative and sum to 1 "
            f"for every image, so probabilities. {_FIX}."
        )


def own_input_shape(model):
    """(H, W, C) as the model itself knows it, sides of any size ``None``; or ``None``."""
    if not model.built:
        return None
    shape = getattr(model, "input_shape", None)
    if shape is None:  # a subclassed model remembers only what it was built with
        shape = (model.get_build_config() or {}).get("input_shape")
    return shape[1:] if isinstance(shape, (tuple, list)) else None


def _known(shape):
    """``shape`` as a tuple if it is one of whole numbers, else ``None``."""
    if not shape or not all(isinstance(side, int) for side in shape):
        return None
    return tuple(shape)
