"""A head on the unit sphere (Pang et al., NeurIPS 2020: hypersphere embedding)."""

import keras
from keras import layers

from keras_emr.errors import UserError
from keras_emr.models.logits import require_logits
from keras_emr.part import non_negative

# The length of a vector of zeros has no derivative: a blank image would make NaN.
_OFFSET = 1e-6


def hypersphere_head(model, scale=15.0):
    """``model`` with its last dense layer exchanged for ``scale * cos(angle to the class)``.

    Features and the classes' weights have length one: the features by a layer, the weights by a
    constraint that every optimizer step ends with, there is no bias. All are Keras's own layers,
    in float32, so that the model loads anywhere. Cosines alone bound the logits; train with
    ``logit_margin = scale * m`` of a defense, the authors' m being 0.2.

    Bounded logits also flatten cross-entropy: judge such a model by attacks on the margin or the
    difference of logits ratio, as AutoAttack's, never by cross-entropy alone.

    Args:
        model: Sequential or Functional model that ends in a dense layer, images to logits. Its
            other layers are shared with the result.
        scale: ``s`` > 0; the authors use 15 on CIFAR-10.

    Returns:
        Keras model, (N, H, W, C) images in [0, 1] to (N, K) logits in [-scale, scale].

    Raises:
        UserError: another kind of model, or a scale that is not above 0.
    """
    if not non_negative("scale", scale):
        raise UserError(f"the scale of a hypersphere head must be above 0. Received: {scale!r}.")
    require_logits(model)
    last = model.layers[-1] if getattr(model, "inputs", None) else None
    if not isinstance(last, layers.Dense):
        ending = type(last or model).__name__
        raise UserError(
            "a hypersphere head takes the place of a dense layer at the end of a Sequential or "
            f"Functional model. Received: {model.name!r}, which ends in {ending}."
        )
    kernel = keras.constraints.UnitNorm(axis=0)
    cosines = layers.Dense(
        last.units, use_bias=False, kernel_constraint=kernel, dtype="float32", name="cosines"
    )
    x = layers.Rescaling(1.0, offset=_OFFSET, dtype="float32", name="features")(last.input)
    x = cosines(layers.UnitNormalization(dtype="float32", name="directions")(x))
    x = layers.Rescaling(scale, dtype="float32", name="logits")(x)
    cosines.kernel.assign(kernel(cosines.kernel))
    return keras.Model(model.inputs[0], x, name=f"{model.name}_hypersphere")
