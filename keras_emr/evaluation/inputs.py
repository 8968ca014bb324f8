"""What an evaluation was given: refused before it becomes a number that means nothing."""

import keras
import numpy as np

from keras_emr.data.checks import check_labels, check_range
from keras_emr.errors import UserError
from keras_emr.models.logits import own_input_shape, require_logits
from keras_emr.network import Network


def checked_examples(x, y, classes):
    """Images in the backend's float type and int32 labels.

    Args:
        x: (N, H, W, C) images in [0, 1].
        y: (N,) integer labels.
        classes: number of logits K; labels are below it.

    Raises:
        UserError: no examples, pixels that are not finite or outside [0, 1], bad labels.
    """
    x, y = np.asarray(x, keras.config.floatx()), np.asarray(y)
    if len(x) == 0 or len(x) != len(y):
        raise UserError(
            f"nothing to attack. Received: {len(x)} images and {len(y)} labels. Expected as many "
            "labels as images, and at least one."
        )
    check_range("x", x)
    return x, check_labels("y", y, len(x), classes, "the model")


def require_finite(finite):
    """Raise :class:`UserError` if the logits of a clean image are not finite: ``finite`` (N,)."""
    if not finite.all():
        raise UserError(
            f"the model gives logits that are not finite. Received: NaN or Inf for "
            f"{int((~finite).sum())} of {len(finite)} clean images. Expected finite logits; the "
            "training of this model probably diverged: take an earlier checkpoint."
        )


def require_classifier(model, image_shape):
    """Raise :class:`UserError` unless ``model`` takes images (H, W, C) and ends in logits."""
    takes, given = own_input_shape(model), tuple(image_shape)
    if takes is not None:
        sides = zip(takes, given, strict=False)
        if len(takes) != len(given) or any(side not in (None, has) for side, has in sides):
            raise UserError(
                f"model and data do not fit. Received: images {given} for a model that takes "
                f"{tuple(takes)}."
            )
    require_logits(model, given)


def require_fit(model, image_shape, classes):
    """Raise :class:`UserError` unless ``model`` takes images of that shape and has such classes.

    Args:
        model: Keras classifier to logits.
        image_shape: (H, W, C) of the data.
        classes: number of classes in the data; the model may have more outputs.
    """
    require_classifier(model, image_shape)
    if Network(model).classes < classes:
        raise UserError(
            f"model and data do not fit. Received: {classes} classes for a model with "
            f"{Network(model).classes} outputs."
        )
