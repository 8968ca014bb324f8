"""The classifier as attacks and regularizers see it: images in, logits out, no state changed."""

import contextlib
import functools

import keras
from keras import ops

from keras_emr import backend
from keras_emr.errors import UserError
from keras_emr.losses import widen
from keras_emr.network.folding import folded, normalized
from keras_emr.network.inference import Inference
from keras_emr.network.substitution import (
    cast_at_use,
    changed,
    cheaper,
    precision,
    remembered,
    repeatable,
)

# Between the seeds of two passes: more draws than a layer makes in one.
_APART = 1009


def layers_of(model):
    """All layers, the inner ones of nested models too."""
    return list(model._flatten_layers())


@contextlib.contextmanager
def full_precision(model):
    """Run the layers of a mixed-precision ``model`` in float32 inside the block.

    With a float16 loss, 59 % of the input gradients of a small MNIST network were exactly zero:
    neither an attack nor an effective weight can be computed that way.
    """
    with changed(precision(layers_of(model), "float32")):
        yield


class Network:
    """``model`` as a pure function of the images, in float32 or wider.

    Apart from a plain call, nothing below changes the model: BatchNorm statistics, seed
    generators and every other variable are read through a ``StatelessScope`` whose updates are
    dropped.

    Args:
        model: Keras classifier, (N, H, W, C) images in [0, 1] to (N, K) logits.
    """

    def __init__(self, model):
        self.model = model
        self._layers = layers_of(model)
        self._passes, self._constant = [], {}

    def __call__(self, x, training, sloped=False):
        """The model itself: logits in its own precision, states and weights as they move.

        ``sloped``: :meth:`vjp` will be asked of these very images; where it can, it then shares
        this pass up to the first dropout, forwards and backwards.
        """
        if not sloped or not self.shares_passes:
            with changed(cheaper(self._layers)):
                return self.model(x, training=training)

        def both(x):
            with changed(cheaper(self._layers, twice=True)), changed(remembered(self._layers)):
                logits = self.model(x, training=training)
                return widen(self._inference_beside(x)), logits

        inference, logits, pullback = backend.vjp(both, ops.stop_gradient(x))
        self._passes.append((x, inference, pullback))
        return logits

    @functools.cached_property
    def _normalized(self):
        return normalized(self.model)

    @functools.cached_property
    def _inference(self):
        return Inference(self.model)

    def _inference_beside(self, x):
        return self.model(x, training=False)

    def vjp(self, x, training=False):
        """Logits (N, K), in float32 or wider, and their pullback: a combination (N, K) to images.

        Both have gradients that reach the weights, and the weights only.
        """
        for images, logits, pullback in self._passes:
            if images is x and not training:
                return logits, pullback
        live = self.live(training, twice=True)
        logits, _, pullback = backend.vjp(
            lambda x: (widen(live(x)), ()), ops.stop_gradient(ops.convert_to_tensor(x))
        )
        return logits, pullback

    @property
    def shares_passes(self):
        """Whether a training pass and :meth:`vjp` of the same images can be computed together."""
        return not precision(self._layers, "float32") and repeatable(self._layers)

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

    def _values(self, values, cast=()):
        """What a pass reads, by its variable: ``values``, in the variables' dtypes, and ``cast``.

        That is *all* variables, because during `fit` Keras empties them on JAX and an unmapped one
        would read as None.
        """
        scope = keras.StatelessScope(list(zip(self.model.variables, values, strict=True)))
        for update in cast:
            scope.add_update(update)
        return scope.state_mapping

    def _pass(self, values, training, changes, compute="float32"):
        """``x -> logits`` with ``values`` of :meth:`_values`; it does not hold this object."""
        random_state = backend.preserve_random_state if training else contextlib.nullcontext
        changes = precision(self._layers, compute) + changes
        model = functools.partial(self.model, training=True) if training else self._inference

        def logits(x):
            # The scope is entered inside the function that is differentiated: entered around it,
            # JAX leaks tracers as soon as a layer writes state.
            scope = keras.StatelessScope()
            scope.state_mapping.update(values)
            with scope, changed(changes), random_state():
                return model(x)

        return logits

    @property
    def seed_states(self):
        """Variables that random layers draw from: of noise at inference, and of dropout."""
        return [g.state for layer in self._layers for g in getattr(layer, "_seed_generators", ())]

    def frozen(self, training=False, noise=None, compute="float32", fold=True):
        """``x -> logits`` with constant weights, those of now: gradients reach the images only.

        Args:
            training: mode of the model.
            compute: precision of its layers, ``float32`` or ``bfloat16``.
            noise: integer tensor; a layer that is random at inference draws other numbers for
                each. ``None``: always the same.
            fold: at inference make each BatchNorm a part of the convolution before it, where it
                can be. That costs something once, and saves it many times over in an attack.
        """
        seeds = () if noise is None else {id(v) for v in self.seed_states}
        values, cast, wanted = [], [], cast_at_use(self._layers, compute)
        for variable in self.model.variables:
            value = ops.stop_gradient(ops.convert_to_tensor(variable))
            if id(variable) in wanted:
                cast.append((variable, ops.cast(value, compute)))
            if id(variable) in seeds:
                value = value + ops.cast(noise, value.dtype) * ops.cast([0, _APART], value.dtype)
            values.append(value)
        changes = cheaper(self._layers, constant=True)
        if fold and not training:
            changes += folded(self._normalized, compute)
        return self._pass(self._values(values, cast), training, changes, compute)

    def constant(self, compute="float32"):
        """:meth:`frozen` at inference, of the first call: what one step attacks, and shows.

        Asked first outside of loops, whose graph or trace it would be made in.
        """
        if compute not in self._constant:
            self._constant[compute] = self.frozen(compute=compute)
        return self._constant[compute]

    def live(self, training=False, twice=False):
        """``x -> logits`` whose gradients reach the weights as well.

        ``twice``: for gradients of an input gradient.
        """
        # On JAX a BatchNorm statistic that this step has just updated is a function of the weights:
        # without the stop, gradients would flow through it, as on no other backend.
        values = [
            v.value if v.trainable else ops.stop_gradient(v.value) for v in self.model.variables
        ]
        return self._pass(self._values(values), training, cheaper(self._layers, twice))

    def at(self, weights, training=False):
        """``x -> logits`` with other values, tensors, in place of the trainable variables'."""
        given = iter(weights)
        values = [
            next(given) if v.trainable else ops.stop_gradient(v.value) for v in self.model.variables
        ]
        return self._pass(self._values(values), training, cheaper(self._layers))


class _Outline(keras.Operation):
    """A function whose output shape can be asked for."""

    def __init__(self, fn):
        super().__init__()
        self.call = fn
