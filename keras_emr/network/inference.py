"""A model's inference without the bookkeeping that Keras does around every layer.

Keras finds out at every call of a layer what never changes: its arguments, its mask, whether it is
built. Where nothing is compiled, as on torch, an attack pays for it in every step.
"""

from __future__ import annotations

import keras
from keras.src.backend import AutocastScope, get_autocast_scope, get_keras_mask
from keras.src.layers.merging.base_merge import Merge
from keras.src.models.functional import Functional


def graph_of(model):
    """The graph that is all that a functional or sequential ``model`` runs, otherwise ``None``."""
    if isinstance(model, keras.Sequential):
        if type(model).call is not keras.Sequential.call or "call" in vars(model):
            return None
        model = getattr(model, "_functional", None)
    plain = isinstance(model, Functional) and type(model).call is Functional.call
    return model if plain and "call" not in vars(model) else None


class Inference:
    """``x -> model(x, training=False)``: the same operations of the same layers, in their order.

    Simple layers of Keras and of this package are run by their ``call``; other layers, and what is
    not a graph from one input to one output, as Keras runs them.
    """

    def __init__(self, model):
        self._model, self._graph, self._steps = model, graph_of(model), ()
        if self._graph is not None and len(self._graph.inputs) == len(self._graph.outputs) == 1:
            nodes = self._graph._nodes_by_depth
            self._steps = [
                (_arguments(node), _run(node.operation), [id(tensor) for tensor in node.outputs])
                for depth in sorted(nodes, reverse=True)
                for node in nodes[depth]
                if not node.is_input
            ]

    def __call__(self, x):
        if not self._steps or keras.distribution.distribution() is not None or not self._fits(x):
            return self._model(x, training=False)  # which also has the words for what is wrong
        scope = _scope(self._model)
        if scope is None:
            return self._through(x)
        with scope:
            return self._through(x)

    def _fits(self, x):
        if not keras.ops.is_tensor(x) or _masked(x):
            return False
        wanted, given = self._graph.inputs[0], tuple(x.shape)
        return (
            len(given) == len(wanted.shape)
            and all(m is None or n in (None, m) for n, m in zip(given, wanted.shape, strict=True))
            and keras.backend.standardize_dtype(x.dtype) == wanted.dtype
        )

    def _through(self, x):
        values = {id(self._graph.inputs[0]): x}
        for arguments, run, outputs in self._steps:
            found = run(*arguments(values))
            if keras.ops.is_tensor(found):
                values[outputs[0]] = found
            else:
                values.update(zip(outputs, keras.tree.flatten(found), strict=True))
        return values[id(self._graph.outputs[0])]


def _arguments(node):
    """Positional and other arguments of a node from the tensors' values, by their identities."""
    given = node.arguments
    # Keras leaves among the node's own what it found out itself: no mask, and a mode.
    plain = isinstance(node.operation, keras.Layer) and all(
        name == "training" or (name == "mask" and value is None)
        for name, value in given.kwargs.items()
    )
    if (plain or not given.kwargs) and len(given.args) == 1:
        (only,) = given.args
        if isinstance(only, keras.KerasTensor):
            key = id(only)
            return lambda values: ((values[key],), {})
        if isinstance(only, list) and all(isinstance(x, keras.KerasTensor) for x in only):
            keys = [id(x) for x in only]
            return lambda values: (([values[key] for key in keys],), {})
    return given.fill_in


def _run(operation):
    """``args, options -> outputs`` of a layer or another operation."""
    if not isinstance(operation, keras.Layer):
        return lambda args, options: operation(*args, **options)

    def called(args, options):
        # Also to a layer that does not ask: Keras tells those in it.
        return operation(*args, **(options | {"training": False}))

    if isinstance(operation, keras.Model) and graph_of(operation) is not None:
        inference = Inference(operation)
        return lambda args, options: called(args, options) if options else inference(*args)
    if not _simple(operation):
        return called
    told = {"training": False} if operation._call_has_training_arg else {}

    def run(args, options):
        if options or len(args) != 1:
            return called(args, options)
        given = args[0]
        tensors = given if isinstance(given, list) else args
        if any(map(_masked, tensors)):
            return called(args, options)
        wanted = operation.input_dtype
        if any(keras.backend.standardize_dtype(x.dtype) != wanted for x in tensors):
            policy, cast = operation.dtype_policy, operation.autocast
            given = [policy.convert_input(x, cast, wanted) for x in tensors]
            given = given if isinstance(args[0], list) else given[0]
        scope = _scope(operation)
        if scope is None:
            return operation.call(given, **told)
        with scope:
            return operation.call(given, **told)

    return run


def _simple(layer):
    """Whether Keras does nothing at inference, without a mask, but to run the layer's ``call``."""
    kind = type(layer)
    return (
        kind.__module__.split(".")[0] in ("keras", "keras_emr")
        and kind.__call__ is keras.Layer.__call__
        and (kind.compute_mask is keras.Layer.compute_mask or isinstance(layer, Merge))
        and layer.built
        and not any(layer._flatten_layers(include_self=False))
        and layer.activity_regularizer is None
        and getattr(layer, "quantization_mode", None) is None
        and not layer._remat_mode
        and layer._convert_input_args
    )


def _masked(x):
    return get_keras_mask(x) is not None


def _scope(layer):
    """The precision that ``layer`` takes its variables in, as ``Layer.__call__`` finds it."""
    current, compute = get_autocast_scope(), layer.compute_dtype
    if current is None:
        return AutocastScope(compute) if compute != layer.variable_dtype else None
    if not layer.autocast or not keras.backend.is_float_dtype(compute):
        return AutocastScope(None)
    return AutocastScope(compute) if current.dtype != compute else None
