"""Everything that training goes on from, as NumPy arrays; and what a checkpoint belongs to."""

from __future__ import annotations

import contextlib
import hashlib
import json

import keras
import numpy as np
from keras import ops

from keras_emr import backend
from keras_emr.errors import UserError

_RANDOM = "random/"


def _groups(classifier):
    """Every variable once, in an order that does not depend on layers' names.

    ``state`` has the network, the maximizer, averages and their counters, the epoch, and the
    seed generators (which weight files leave out): the attack's, the regularizers', dropout's.
    """
    of_phi = classifier.maximizer_optimizer
    groups = {
        "state": classifier.variables,
        "optimizer": classifier.optimizer.variables,
        "maximizer_optimizer": of_phi.variables if of_phi else [],
        "metrics": classifier.metrics_variables,
    }
    seen, result = set(), {}
    for name, variables in groups.items():
        result[name] = [v for v in variables if not (id(v) in seen or seen.add(id(v)))]
    return result


def _named(classifier, groups):
    every = _groups(classifier)
    return {f"{group}/{i}": v for group in groups for i, v in enumerate(every[group])}


def _value(variable):
    # A copy, because on TensorFlow's replicas `value` is a variable still.
    return np.array(ops.convert_to_numpy(ops.copy(variable.value)))


def _plain(variable):
    """The value in a type that NumPy itself has: bfloat16 as 16-bit integers, and so on."""
    value = _value(variable)
    return value if value.dtype.isbuiltin == 1 else value.view(f"u{value.dtype.itemsize}")


@contextlib.contextmanager
def _live(classifier):
    """Within the block the variables hold what a step left, whatever is under way."""
    classifier._settle()
    swapped = classifier._swapped
    if swapped:  # validation with averaged weights
        classifier._swap()
    try:
        yield
    finally:
        if swapped:
            classifier._swap()


def capture(classifier):
    """All state of ``classifier`` after the last step: ``{name: array}``."""
    with _live(classifier):
        groups = ("state", "optimizer", "maximizer_optimizer", "metrics")
        arrays = {name: _plain(v) for name, v in _named(classifier, groups).items()}
    return {**arrays, **_random_state()}


def capture_passing(classifier):
    """The part of :func:`capture` that validation changes: metrics and random state."""
    classifier._settle()
    passing = _named(classifier, ("metrics",))
    seeds = {id(v) for v in classifier._seed_states()}
    passing |= {k: v for k, v in _named(classifier, ("state",)).items() if id(v) in seeds}
    return {**{name: _plain(v) for name, v in passing.items()}, **_random_state()}


def trainable_names(classifier):
    """Names, in what :func:`capture` gives, of the variables that training moves."""
    trained = {id(v) for v in classifier.model.trainable_variables}
    if classifier.maximizer is not None:
        trained |= {id(v) for v in classifier.maximizer.variables}
    return [name for name, v in _named(classifier, ("state",)).items() if id(v) in trained]


def _random_state():
    return {_RANDOM + name: value for name, value in backend.random_state().items()}


def restore(classifier, arrays):
    """Give ``classifier`` the state that :func:`capture` took, but for metrics and randomness.

    Raises:
        UserError: its variables are others; nothing is changed then.
    """
    variables = _named(classifier, ("state", "optimizer", "maximizer_optimizer"))
    stored = {name for name in arrays if not name.startswith(("metrics/", _RANDOM))}
    wrong = sorted(stored ^ set(variables))
    wrong = wrong or [n for n, v in variables.items() if tuple(v.shape) != arrays[n].shape]
    if wrong:
        raise UserError(
            f"the checkpoint is of another model: its variable {wrong[0]} differs. Received: "
            f"{len(variables)} variables, the checkpoint has {len(stored)}. Continue with what the "
            "run began with."
        )
    _assign(variables, arrays)


def without_random(arrays):
    """``arrays`` without the backend's hidden random state."""
    return {k: v for k, v in arrays.items() if not k.startswith(_RANDOM)}


def passing(arrays):
    """What of a checkpoint's arrays :func:`restore_passing` needs."""
    return {k: v for k, v in arrays.items() if k.startswith(("metrics/", _RANDOM))}


def restore_passing(classifier, arrays):
    """Metrics and the backend's hidden random state, within an epoch that has begun."""
    classifier._settle()
    metrics = _named(classifier, ("metrics",))
    stored = {name for name in arrays if name.startswith("metrics/")}
    if stored != set(metrics):
        # `compile(metrics=...)` makes its variables with the first results.
        some = ops.zeros((1, *classifier.model.input_shape[1:]))
        label = ops.zeros((1,), "int32")
        classifier.compute_metrics(some, label, classifier.model(some, training=False), None)
        classifier.reset_metrics()
        metrics = _named(classifier, ("metrics",))
    _assign(metrics, arrays)
    found = {k.removeprefix(_RANDOM): v for k, v in arrays.items() if k.startswith(_RANDOM)}
    backend.set_random_state(found)


def _assign(variables, arrays):
    for name, variable in variables.items():
        variable.assign(arrays[name].view(_value(variable).dtype))


def identity(classifier, data, **facts):
    """What a checkpoint belongs to, nested as JSON has it: with another one it cannot be resumed.

    Args:
        classifier: :class:`RobustClassifier`.
        data: :class:`keras_emr.data.Dataset`.
        facts: of the run, e.g. ``batch_size``.
    """
    try:
        config = classifier.get_config()
    except NotImplementedError:  # a network that cannot say what it is made of
        config = {"model": type(classifier.model).__name__, "defense": repr(classifier.defense)}
    layers = {layer.name: f"layer-{i}" for i, layer in enumerate(classifier._flatten_layers())}
    shapes = [tuple(v.shape) for v in classifier.model.variables]
    network = _settled([config.pop("model"), shapes], layers)
    config.pop("name", None)
    serialized = keras.saving.serialize_keras_object
    optimizers = [serialized(o) for o in (classifier.optimizer, classifier.maximizer_optimizer)]
    size = f"{len(data.x_train)} training and {len(data.x_val)} validation images"
    return {
        "backend": backend.NAME,
        "network": hashlib.sha256(json.dumps(network, sort_keys=True).encode()).hexdigest()[:16],
        **_settled(config, layers),
        "optimizer": _nameless(_settled(optimizers[0], layers)),
        "maximizer optimizer": _nameless(_settled(optimizers[1], layers)),
        "data set": f"{data.name}, {size}, SHA-256 {data.fingerprint[:16]}",
        **{field.replace("_", " "): value for field, value in facts.items()},
    }


def _settled(value, layers):
    """As JSON gives it back, and without the numbers that Keras gives layers as they are made."""
    if isinstance(value, dict):
        return {str(key): _settled(item, layers) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_settled(item, layers) for item in value]
    if isinstance(value, str):
        return layers.get(value, value)
    # NaN is not equal to itself, and what JSON has no word for does not come back from it.
    return value if isinstance(value, bool | int | float | None) and value == value else str(value)


def _nameless(optimizer):
    """Without its name, which is numbered, and a rate that is a number, which may change."""
    if not isinstance(optimizer, dict):
        return optimizer
    rate = optimizer.get("learning_rate")
    left_out = {"name"} | ({"learning_rate"} if isinstance(rate, int | float) else set())
    return {key: _nameless(value) for key, value in optimizer.items() if key not in left_out}
