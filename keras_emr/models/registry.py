"""Networks by name, file or function. Imports keras only when one is made."""

from __future__ import annotations

import importlib
import inspect
import os
import re
import sys
from pathlib import Path

from keras_emr.errors import UserError, unknown
from keras_emr.registry import Registry

MODELS = Registry(
    "model",
    {
        "small-cnn": "keras_emr.models.small_cnn:small_cnn",
        "mlp": "keras_emr.models.mlp:mlp",
        "vgg16": "keras_emr.models.vgg:vgg16",
        "resnet18": "keras_emr.models.resnet:resnet18",
        "preact-resnet18": "keras_emr.models.resnet:preact_resnet18",
    },
)
_WIDE = re.compile(r"wide-resnet-(\d+)-(\d+)(-emr)?")
# What messages and help call them.
MODEL_NAMES = [*MODELS.names, "wide-resnet-34-10", "wide-resnet-34-10-emr"]

ACTIVATIONS = ("relu", "leaky_relu", "elu", "selu", "silu", "gelu", "softplus", "mish", "tanh")
LEAKY_SLOPE = 0.1  # of leaky_relu: that of the EMR authors' network; Keras's own is 0.2
# Mean and standard deviation of the training pixels, as Rice et al.'s code has them.
NORMALIZATIONS = {"cifar10": ((0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616))}


def kind_of(name):
    """``name``, ``wide``, ``file`` or ``function``. Raises :class:`UserError` for none of them."""
    if name in MODELS.homes:
        return "name"
    if match := _WIDE.fullmatch(name):
        depth, widen = int(match[1]), int(match[2])
        if depth % 6 != 4 or depth < 10 or widen < 1:
            raise UserError(
                f"depth of a wide ResNet must be 6 n + 4. Received: {name!r}. Expected for "
                "example wide-resnet-28-10 or wide-resnet-34-10-emr."
            )
        return "wide"
    if name.endswith(".keras"):
        return "file"
    if re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", name):
        return "function"
    raise unknown("model", name, [*MODEL_NAMES, "FILE.keras", "MODULE:FUNCTION"])


def check_model_name(name):
    """``name`` if a network may be called that. Raises :class:`UserError` otherwise."""
    kind_of(name)
    return name


def located(name):
    """``name`` as it stays valid in another folder."""
    return str(Path(name).resolve()) if kind_of(name) == "file" else name


def short_name(name):
    """What a run folder is called after the network."""
    kind = kind_of(name)
    if kind == "file":
        return Path(name).stem
    return name.replace(":", "-") if kind == "function" else name


def make_model(name, input_shape, classes, activation=None, normalization=None):
    """The network called ``name``.

    Args:
        name: one of ``MODEL_NAMES``, ``wide-resnet-D-K`` or ``wide-resnet-D-K-emr``; a ``.keras``
            file, which is taken with its weights; or ``module:function``, which is called with
            (input_shape, classes) and returns a Keras model to logits.
        input_shape: (H, W, C).
        classes: number of classes K.
        activation: one of ``ACTIVATIONS``; ``None``: the network's own.
        normalization: ``None``, one of ``NORMALIZATIONS`` or ``(mean, std)`` per channel.

    Raises:
        UserError: no such network, it does not fit the images, or it lacks such an option.
    """
    given = {"activation": activation, "normalization": normalization}
    given = {key: value for key, value in given.items() if value is not None}
    kind = kind_of(name)
    if kind == "file":
        _refuse(name, given, ())
        return _from_file(name, input_shape, classes)
    if kind == "wide":
        depth, widen, emr = _WIDE.fullmatch(name).groups()
        build = importlib.import_module("keras_emr.models.wide_resnet").wide_resnet
        given |= {"depth": int(depth), "widen": int(widen), "variant": "emr" if emr else "trades"}
    else:
        build = MODELS.get(name) if kind == "name" else _function(name)
        _refuse(name, given, inspect.signature(build).parameters)
    return _checked(name, build(tuple(input_shape), classes, **given), input_shape, classes)


def _refuse(name, given, known):
    for key, value in given.items():
        if key not in known:
            raise UserError(
                f"{key}: the model has no such option. Received: {key}={value!r} with model "
                f"{name!r}. Leave it out."
            )


def _from_file(name, input_shape, classes):
    from keras_emr.models.loading import load_model

    return _checked(name, load_model(name), input_shape, classes)


def _function(name):
    module, attribute = name.split(":")
    here = os.getcwd()
    if here not in sys.path:  # as `python -m` has it, and the console script has not
        sys.path.insert(0, here)
    try:
        function = getattr(importlib.import_module(module), attribute)
    except Exception as error:  # a user's module can fail in any way
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"model: cannot import the function: {reason}. Received: {name!r}. Expected "
            "MODULE:FUNCTION on the Python path or in this folder."
        ) from None
    if not callable(function):
        raise UserError(f"model: not a function. Received: {name!r}. Expected MODULE:FUNCTION.")
    return function


def _checked(name, model, input_shape, classes):
    """``model`` if it is one, takes the images and has the classes."""
    import keras

    from keras_emr.models.logits import own_input_shape

    if not isinstance(model, keras.Model):
        raise UserError(
            f"model: the function must return a keras.Model. Received: {type(model).__name__} "
            f"from {name!r}."
        )
    own = own_input_shape(model)
    if own is not None and (
        len(own) != len(input_shape)
        or any(side not in (None, given) for side, given in zip(own, input_shape, strict=True))
    ):
        raise UserError(
            f"model: made for other images. Received: {name!r}, input shape {tuple(own)}, for "
            f"images {tuple(input_shape)}."
        )
    shape = getattr(model, "output_shape", None)
    if isinstance(shape, tuple) and shape[-1] != classes:
        raise UserError(
            f"model: made for another number of classes. Received: {name!r}, output shape {shape}, "
            f"for {classes} classes."
        )
    return model
