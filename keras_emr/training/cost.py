"""What a training step costs: passes, FLOPs and memory, counted before anything is trained."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from unittest import mock

import keras
import numpy as np

from keras_emr import backend
from keras_emr.network import Network
from keras_emr.network.substitution import changed

_KERNELS = ("kernel", "depthwise_kernel", "pointwise_kernel")


@dataclass(frozen=True)
class Forward:
    """One forward pass of one example, and what the passes backwards follow from it.

    ``flops``: two for each multiply-add of convolutions and dense layers; what else a network does
    (normalisation, activations, pooling) is left out. ``first_layer``: those of the first layer
    with a kernel. ``activations``: numbers that its layers put out.
    """

    flops: int
    activations: int
    first_layer: int = 0

    @property
    def to_input(self):
        """FLOPs from the logits back to the image: every kernel once, as forwards."""
        return self.flops

    @property
    def to_weights(self):
        """FLOPs of all kernels' gradients, the way back to them not counted."""
        return self.flops

    @property
    def step(self):
        """FLOPs of a training step: forwards, back as far as the first kernel, kernel gradients."""
        return 3 * self.flops - self.first_layer


def forward_cost(model, image_shape):
    """:class:`Forward` of ``model`` for one image (H, W, C), by its layers' shapes."""
    flops = activations = first = 0

    def watched(layer, call):
        def wrapper(x, *args, **kwargs):
            nonlocal flops, activations, first
            out = call(x, *args, **kwargs)
            if not getattr(layer, "_layers", None):  # of nested layers the inner ones count
                own = _layer_flops(layer, x, out)
                first = first or own
                flops += own
                leaves = [t for t in keras.tree.flatten(out) if hasattr(t, "shape")]
                activations += sum(int(np.prod(t.shape[1:])) for t in leaves)
            return out

        return wrapper

    layers = model._flatten_layers(include_self=False)
    with changed([(layer, "call", watched(layer, layer.call)) for layer in layers]):
        _Symbolic(model).compute_output_spec(keras.KerasTensor((1, *image_shape)))
    return Forward(flops, activations, first)


class _Symbolic(keras.Operation):
    def __init__(self, model):
        super().__init__()
        self.call = model


def _layer_flops(layer, x, out):
    """Every kernel weight is used once at every position of the output (transposed: input)."""
    shape = (x if "Transpose" in type(layer).__name__ else out).shape
    first = getattr(layer, "data_format", None) == "channels_first"
    positions = int(np.prod(shape[2:] if first else shape[1:-1]))
    weights = sum(int(np.prod(getattr(layer, k).shape)) for k in _KERNELS if hasattr(layer, k))
    return 2 * weights * positions


@dataclass
class Passes:
    """Passes through the network in one training step, counted in one that was really made.

    ``forward``: passes forwards; ``to_input``: passes backwards that stop at the image (each about
    one forward pass), as an attack's step needs one; ``to_weights``: passes that are followed
    backwards to the weights (about two forward passes each); ``double``: input gradients that are
    differentiated once more (EMR; about one pass for the gradient and two for its derivative).
    """

    forward: int = 0
    to_input: int = 0
    to_weights: int = 0
    double: int = 0

    @property
    def in_forward_passes(self):
        """All of them in units of a forward pass."""
        return self.forward + self.to_input + 2 * self.to_weights + 3 * self.double


def step_passes(classifier, x, y):
    """:class:`Passes` of a training step on the images ``x`` (n, H, W, C), labels ``y``.

    Makes the step's forward part, eagerly: a learned maximizer moves, so does what a training pass
    changes. Use a classifier that is thrown away.
    """
    found = Passes()
    model_call = classifier.model.call
    value_and_grad, vjp = backend.value_and_grad, backend.vjp
    inference_beside = Network._inference_beside

    def forward(*args, training=None, **kwargs):
        found.forward += 1
        return model_call(*args, training=training, **kwargs)

    def to_input(fn, x):
        found.to_input += 1
        return value_and_grad(fn, x)

    def beside(self, x):
        logits = inference_beside(self, x)
        found.forward -= 1  # but for the layers from the first dropout on it is computed already
        return logits

    def doubled(fn, x):
        out, aux, pullback = vjp(fn, x)

        def counted(cotangent):
            found.double += 1
            return pullback(cotangent)

        return out, aux, counted

    def learning(method):
        def made(self, *args, **kwargs):
            inner = method(self, *args, **kwargs)

            def counted(x):
                found.to_weights += 1
                return inner(x)

            return counted

        return made

    def loop(n, body, state, unroll=False):
        for i in range(n):
            state = body(i, state)
        return state

    patches = [
        mock.patch.object(backend, "value_and_grad", to_input),
        mock.patch.object(backend, "vjp", doubled),
        mock.patch.object(backend, "loop", loop),
        mock.patch.object(Network, "_inference_beside", beside),
        mock.patch.object(Network, "live", learning(Network.live)),
        mock.patch.object(Network, "at", learning(Network.at)),
        changed([(classifier.model, "call", forward)]),
    ]
    with contextlib.ExitStack() as stack:
        for patch in patches:
            stack.enter_context(patch)
        # A perturbation that persists costs no pass of its own.
        x_adv = x if classifier.persists else None
        if classifier.weight_perturbation is not None:
            x_adv, _ = classifier.perturb(x, y, None)
        classifier.robust_step(x, y, None, training=True, x_adv=x_adv)
        if classifier._learns == "alternating":
            classifier.maximizer_step(x, y)
    # The passes that the loss itself makes.
    found.to_weights += int(classifier.defense.needs_clean)
    found.to_weights += int(classifier.defense.needs_adversarial)
    return found


def maximizer_flops(classifier, image_shape):
    """FLOPs per example that a learned maximizer's own network takes in a step; 0 without one."""
    maximizer = classifier.maximizer
    if maximizer is None:
        return 0
    # A recurrent cell serves every pixel of every channel, a generator's kernel every pixel.
    recurrent = "cell" in maximizer.describe() and hasattr(maximizer, "hidden")
    positions = int(np.prod(image_shape if recurrent else image_shape[:2]))
    times = 3 if classifier._learns else 1  # forwards, and backwards to its weights
    return 2 * parameters(maximizer.variables) * positions * classifier.attack.steps * times


def parameters(variables):
    """Numbers in ``variables``."""
    return sum(int(np.prod(v.shape)) for v in variables)


def size(variables):
    """Bytes of ``variables``."""
    return sum(int(np.prod(v.shape)) * np.dtype(_plain(v.dtype)).itemsize for v in variables)


def _plain(dtype):
    name = keras.backend.standardize_dtype(dtype)
    return "float16" if name == "bfloat16" else name


def memory(classifier, image_shape, batch, forward, passes):
    """Estimated bytes on a device, by what holds them.

    Weights, gradients, optimizers and averages are counted. ``activations``: all layers' outputs
    for ``batch`` images in every pass that is followed back to the weights (twice where an input
    gradient is differentiated), or, if that is more, in the attack's one pass and its gradient; in
    the precision of the step. ``images``: the batch, its adversarial images, noise and gradient.
    ``maximizer``: what a recurrent one keeps of every step. Workspaces of the libraries, fragments
    and what a compiler saves by fusing are not known: expect half to twice the sum.
    """
    model = classifier.model
    item = np.dtype(_plain(model.compute_dtype)).itemsize
    kept = max(passes.to_weights + passes.double, 2 if passes.to_input else 0)
    found = {
        "weights": size(model.variables),
        "gradients": size(model.trainable_variables),
        "optimizer": size(classifier.optimizer.variables),
        "averages": size(getattr(classifier, "_averages", [])),
        "activations": forward.activations * kept * batch * item,
        "images": 4 * int(np.prod(image_shape)) * batch * 4,
        "maximizer": 0,
    }
    if classifier.weight_perturbation is not None:
        found["gradients"] += size(model.trainable_variables)  # the offsets
    if classifier.maximizer is not None:
        found["weights"] += size(classifier.maximizer.variables)
        if classifier.maximizer_optimizer is not None:
            found["optimizer"] += size(classifier.maximizer_optimizer.variables)
        hidden = getattr(classifier.maximizer, "hidden", None)
        if hidden and classifier._learns:
            cell = 6 * hidden * int(np.prod(image_shape)) * batch * 4
            found["maximizer"] = cell * classifier.attack.steps
    found["total"] = sum(found.values())
    return found
