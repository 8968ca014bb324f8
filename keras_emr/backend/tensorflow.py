"""TensorFlow: gradients, compiled functions and the training step."""

import contextlib
import functools

import keras
import tensorflow as tf

from keras_emr.backend import tensorflow_replicas as replicas
from keras_emr.backend.tensorflow_layers import cheaper  # noqa: F401


def _after(done, tensors):
    """``tensors``, which nothing can use before all of ``done`` has been computed.

    A step may read a weight without that weight's gradient depending on the value read, as the last
    bias in EMR's pass. TensorFlow's dependency optimizer drops its own edge from such a read to
    the update, and the pass may then see the updated weight.
    """
    with tf.control_dependencies(tf.nest.flatten(done)):
        return [t if t is None else tf.identity(t) for t in tensors]


def value_and_grad(fn, x):
    """Per-example value of ``fn`` and the input gradient of its sum, both without history.

    Args:
        fn: ``x -> (value (N,), aux)``.
        x: float tensor (N, ...).

    Returns:
        ``(value, aux, gradient)``; the gradient has the shape of ``x``.
    """
    with tf.GradientTape(watch_accessed_variables=False) as tape:
        tape.watch(x)
        value, aux = fn(x)
        total = tf.reduce_sum(value)
    gradient = tape.gradient(total, x, unconnected_gradients=tf.UnconnectedGradients.ZERO)
    return tf.stop_gradient(value), tf.nest.map_structure(tf.stop_gradient, aux), gradient


def gradient(fn, values):
    """Gradient of a scalar with respect to a list of tensors.

    Args:
        fn: ``values -> (scalar, aux)``.
        values: list of tensors.

    Returns:
        ``(aux, gradients)``, both without history.
    """
    with tf.GradientTape(watch_accessed_variables=False) as tape:
        tape.watch(values)
        scalar, aux = fn(values)
    gradients = tape.gradient(scalar, values, unconnected_gradients=tf.UnconnectedGradients.ZERO)
    return tf.nest.map_structure(tf.stop_gradient, (aux, gradients))


def update(optimizer, gradients, variables):
    """One step of ``optimizer``."""
    replicas.apply(optimizer, gradients, variables)


def vjp(fn, x):
    """``fn(x)``, a pair of what is pulled back and an aux, and the first one's pullback.

    All are differentiable again with respect to the weights.
    """
    tape = tf.GradientTape(persistent=True, watch_accessed_variables=False)
    with tape:
        tape.watch(x)
        out, aux = fn(x)

    def pullback(cotangent):
        return tape.gradient(
            out,
            x,
            output_gradients=cotangent,
            unconnected_gradients=tf.UnconnectedGradients.ZERO,
        )

    return out, aux, pullback


tanh = keras.ops.tanh
clip = keras.ops.clip


def mix(kernel, columns, parts=1):
    """``kernel @ columns``, kernel (A, B) and very many columns (B, M), in ``parts`` of rows."""
    product = keras.ops.matmul(kernel, columns)
    return keras.ops.split(product, parts, axis=0) if parts > 1 else [product]


def loop(n, body, state, unroll=False):
    """Repeat ``state = body(i, state)``; a graph loop unless XLA compiles the step (``unroll``)."""
    if unroll or n == 1 or tf.executing_eagerly():
        for i in range(n):
            state = body(i, state)
        return state
    # A function of its own. Inlined into the loop, pooling gradients miss oneDNN's kernels, which
    # TensorFlow assigns in an order that a cycle upsets: a tenth of an adversarial step.
    step = tf.function(body, autograph=False, experimental_attributes={"_noinline": True})
    return keras.ops.fori_loop(0, n, step, state)


chain = None  # the way back goes through the steps as they were made


# The first batch size, and then any.
SHAPES_COMPILED = 2


def compiled(fn, variables):
    """``fn`` as a graph function; it reads ``variables`` where they live."""
    # A partial has no code object, by which TensorFlow would take the functions of all models for
    # one that is traced again and again, and warn.
    return tf.function(functools.partial(fn), reduce_retracing=True, autograph=False)


@contextlib.contextmanager
def preserve_random_state():
    """Nothing to do: Keras keeps all of TensorFlow's random state in variables."""
    yield


def seed_epoch(seed):
    """Nothing to do: Keras keeps all of TensorFlow's random state in variables."""


def random_state():
    """Nothing: Keras keeps all of TensorFlow's random state in variables."""
    return {}


def set_random_state(arrays):
    """Nothing to do."""


@contextlib.contextmanager
def released():
    # Keras's optimizer sums gradients through a function with a gradient of its own, for which
    # TensorFlow keeps the graph of every training step that was ever traced.
    registered = _gradient_registry()
    before = set(registered)
    yield
    for name in set(registered) - before:
        if name.startswith("CustomGradient-"):
            del registered[name]


def _gradient_registry():
    from tensorflow.python.framework import ops

    return getattr(getattr(ops, "gradient_registry", None), "_registry", {})


def devices():
    """Names of the devices."""
    found = tf.config.list_physical_devices()
    details = [tf.config.experimental.get_device_details(d).get("device_name") for d in found]
    return [name or device.device_type for name, device in zip(details, found, strict=True)]


def accelerated():
    """Whether there is a GPU or TPU."""
    return any(d.device_type != "CPU" for d in tf.config.list_physical_devices())


def _without_tuning(iterator):
    """Turn off tf.data's search for buffer sizes where Keras feeds it from a ``PyDataset``.

    There is nothing to be found, and every few epochs the end of one waits for it.
    """
    given = getattr(getattr(iterator, "data_adapter", None), "py_dataset", None)
    dataset = getattr(iterator, "_distributed_dataset", None)
    if given is None or not isinstance(dataset, tf.data.Dataset):
        return
    if dataset.options().autotune.enabled is not False:  # validation's comes again every epoch
        options = tf.data.Options()
        options.autotune.enabled = False
        iterator._distributed_dataset = dataset.with_options(options)


class StepMixin:
    """``train_step`` and ``test_step`` of :class:`RobustClassifier` on TensorFlow."""

    def _settle(self):
        """Nothing to do: variables hold their values during ``fit``."""

    def _maybe_symbolic_build(self, iterator=None, data_batch=None):
        _without_tuning(iterator)
        # Keras builds a distributed model by its first batch, which fails where that lies on
        # several hosts; `fit` has built this one.
        if not replicas.several_hosts():
            return super()._maybe_symbolic_build(iterator, data_batch)
        with self.distribute_strategy.scope():
            if self.optimizer is not None and not self.optimizer.built:
                self.optimizer.build(self.trainable_variables)

    def train_step(self, data):
        x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
        if self._maximizer_alone:
            return replicas.logs(self.maximizer_step(x, y))
        x_adv, offsets = None, []
        if self.weight_perturbation is not None:
            x_adv, offsets = self.perturb(x, y, sample_weight)
            offsets = _after((x_adv, offsets), offsets)
            self.move_weights(offsets, 1)
        perturbation, sources = self.perturbation_of(x), [*self.trainable_weights]
        with tf.GradientTape() as tape:
            if perturbation is not None:
                tape.watch(perturbation)
                sources.append(perturbation)
                x_adv = self.perturbed(x, perturbation)
            loss, logs = self.robust_step(x, y, sample_weight, training=True, x_adv=x_adv)
            scaled = self.optimizer.scale_loss(loss)
        gradients = tape.gradient(scaled, sources)
        if perturbation is not None:
            *gradients, slope = _after((loss, logs), gradients)
            self.persist(perturbation, slope)
        gradients = _after((loss, logs), replicas.total(gradients))
        update(self.optimizer, gradients, self.trainable_weights)
        replicas.average_statistics(self.model)
        if offsets:
            self.move_weights(offsets, -1)
        self.average_step()
        if self._learns == "alternating":
            logs |= self.maximizer_step(x, y)
        return replicas.logs(logs)

    def test_step(self, data):
        x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
        return replicas.logs(self.robust_step(x, y, sample_weight, training=False)[1])
