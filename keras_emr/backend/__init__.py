"""The only place where the library names tensorflow, jax or torch.

Each backend module provides the same few things, all else is ``keras.ops``:

* ``value_and_grad(fn, x)``: first-order input gradient, detached (what attacks need);
* ``gradient(fn, values)``: first-order gradient of a scalar, detached (what maximizers learn by);
* ``update(optimizer, gradients, variables)``: one optimizer step;
* ``vjp(fn, x)``: logits, an aux and the logits' differentiable pullback (what second-order
  penalties need);
* ``tanh(x)``: the backend's fastest, to rounding of 1 (not relative to small results);
* ``mix(kernel, columns, parts)``: the product of a small matrix and one of very many columns, as
  that many parts of its rows;
* ``clip(x, low, high)``: ``x`` within two numbers;
* ``loop(n, body, state)``: the backend's fastest way to repeat ``body``;
* ``chain(step, state, records)``: recorded steps made again, to go back through them; ``None``
  where that is no faster than going back through the steps as they were made;
* ``cheaper(twice)``: functions of layers with the same values and cheaper derivatives, by name
  (``relu``, ``leaky_relu``, ``max_pool``, ``conv`` and what its kernel must be ``arranged`` by);
  ``twice``: for second derivatives;
* ``compiled(fn, variables)``: ``fn``, compiled where the backend does, reading ``variables`` live;
* ``StepMixin``: ``train_step`` and ``test_step`` around the shared ``robust_step``;
* ``SHAPES_COMPILED``: how often ``compiled`` compiles at most, whatever batch sizes come;
* ``devices()``: what this process computes on, for reports; ``accelerated()``: more than a CPU;
* ``preserve_random_state()``, ``seed_epoch(seed)``, ``random_state()`` and
  ``set_random_state(arrays)``: the backend's hidden random state, if any;
* ``released()``: a block after which what was compiled within it is dropped;
* ``replicas``: what a step on several devices asks of the others (``jax_devices``,
  ``tensorflow_replicas``, ``torch_processes``); on one device nothing at all.
"""

import importlib

import keras

NAME = keras.backend.backend()
_SUPPORTED = ("tensorflow", "jax", "torch")
if NAME not in _SUPPORTED:
    raise ImportError(
        f"keras_emr has no support for this Keras backend. Received: KERAS_BACKEND={NAME!r}. "
        f"Expected one of: {', '.join(_SUPPORTED)}."
    )

_module = importlib.import_module(f"keras_emr.backend.{NAME}")
replicas = _module.replicas
accelerated = _module.accelerated
value_and_grad = _module.value_and_grad
gradient = _module.gradient
update = _module.update
vjp = _module.vjp
tanh = _module.tanh
clip = _module.clip
loop = _module.loop
chain = _module.chain
mix = _module.mix
cheaper = _module.cheaper
compiled = _module.compiled
SHAPES_COMPILED = _module.SHAPES_COMPILED
devices = _module.devices
released = _module.released
StepMixin = _module.StepMixin
preserve_random_state = _module.preserve_random_state
seed_epoch = _module.seed_epoch
random_state = _module.random_state
set_random_state = _module.set_random_state

__all__ = [
    "NAME",
    "SHAPES_COMPILED",
    "StepMixin",
    "accelerated",
    "chain",
    "cheaper",
    "clip",
    "compiled",
    "devices",
    "gradient",
    "loop",
    "mix",
    "preserve_random_state",
    "random_state",
    "released",
    "replicas",
    "seed_epoch",
    "set_random_state",
    "tanh",
    "update",
    "value_and_grad",
    "vjp",
]
