"""The classifier as attacks and regularizers see it: images in, logits out, no state changed."""

import contextlib

import keras
from keras import ops

from keras_emr import backend
from keras_emr.errors import UserError

_LOW_PRECISION = ("float16", "bfloat16")
# Between the seeds of two passes: more draws than a layer makes in one.
_APART = 1009


@contextlib.contextmanager
def full_precision(model):
    """Run the layers of a mixed-precision ``model`` in float32 inside the block.

    With a float16 loss, 59 % of the input gradients of a small MNIST network were exactly zero:
    neither an attack nor an effective weight can be computed that way.
    """
    low = [
        layer
        for layer in model._flatten_layers()
        if layer.compute_dtype in _LOW_PRECISION and layer.variable_dtype == "float32"
    ]
    saved = [(layer, layer._dtype_policy) for layer in low]
    policy = keras.dtype_policies.get("float32")
    try:
        for layer in low:
            layer._dtype_policy = policy
        yield
    finally:
        for layer, original in saved:
            layer._dtype_policy = original


class Network:
    """``model`` as a pure function of the images, in float32 or wider.

    Neither function below changes the model: BatchNorm statistics, seed generators and every
    other variable are read through a ``StatelessScope`` whose updates are dropped.

    Args:
        model: Keras classifier, (N, H, W, C) images in [0, 1] to (N, K) logits.
    """

    def __init__(self, model):
        self.model = model

    @property
    def classes(self):
        """Number of classes K."""
        shape = getattr(self.model, "output_shape", None)
        if shape is None:  # a subclassed model: traced once for its shape
            built_with = self.model.get_build_config()
            if built_with is None:
                raise UserError(
                    f"the model is not built. Received: model {self.model.name!r}. Call it on a "
                    "batch of images first."
                )
            images = keras.KerasTensor(built_with["input_shape"])
            shape = _Outline(self.frozen()).compute_output_spec(images).shape
        return shape[-1]

    def _call(self, values, x, training):
        # The scope is entered inside the function that is differentiated: entered around it,
        # JAX leaks tracers as soon as a layer writes state. It maps *all* variables, because
        # during `fit` Keras empties them on JAX and an unmapped one would read as None.
        scope = keras.StatelessScope(list(zip(self.model.variables, values, strict=True)))
        random_state = backend.preserve_random_state if training else contextlib.nullcontext
        with scope, full_precision(self.model), random_state():
            return self.model(x, training=training)

    @property
    def seed_states(self):
        """Variables that random layers draw from: of noise at inference, and of dropout."""
        layers = self.model._flatten_layers()
        return [g.state for layer in layers for g in getattr(layer, "_seed_generators", ())]

    def frozen(self, training=False, noise=None):
        """``x -> logits`` with constant weights: gradients reach the images only.

        Args:
            training: mode of the model.
            noise: integer tensor; a layer that is random at inference draws other numbers for
                each. ``None``: always the same.
        """
        seeds = () if noise is None else {id(v) for v in self.seed_states}
        values = []
        for variable in self.model.variables:
            value = ops.stop_gradient(ops.convert_to_tensor(variable))
            if id(variable) in seeds:
                value = value + ops.cast(noise, value.dtype) * ops.cast([0, _APART], value.dtype)
            values.append(value)
        return lambda x: self._call(values, x, training)

    def live(self, training=False):
        """``x -> logits`` whose gradients reach the weights as well."""
        # On JAX a BatchNorm statistic that this step has just updated is a function of the weights:
        # without the stop, gradients would flow through it, as on no other backend.
        values = [
            v.value if v.trainable else ops.stop_gradient(v.value) for v in self.model.variables
        ]
        return lambda x: self._call(values, x, training)

    def at(self, weights, training=False):
        """``x -> logits`` with other values, tensors, in place of the trainable variables'."""
        given = iter(weights)
        values = [
            next(given) if v.trainable else ops.stop_gradient(v.value) for v in self.model.variables
        ]
        return lambda x: self._call(values, x, training)


class _Outline(keras.Operation):
    """A function whose output shape can be asked for."""

    def __init__(self, fn):
        super().__init__()
        self.call = fn
