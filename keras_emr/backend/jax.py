"""JAX: gradients, compiled functions and the training step."""

import contextlib
import math

import jax
import keras

from keras_emr.backend import jax_devices as replicas  # noqa: F401
from keras_emr.backend.jax_layers import cheaper  # noqa: F401

# A loop around a convolution's input gradient is 1.5 to 6 times slower than the unrolled steps
# under XLA on CPU; past this length the compile time costs more than that.
_UNROLL = 64


def value_and_grad(fn, x):
    """Per-example value of ``fn`` and the input gradient of its sum, both without history.

    Args:
        fn: ``x -> (value (N,), aux)``.
        x: float array (N, ...).

    Returns:
        ``(value, aux, gradient)``; the gradient has the shape of ``x``.
    """

    def total(x):
        value, aux = fn(x)
        return value.sum(), (value, aux)

    (_, (value, aux)), gradient = jax.value_and_grad(total, has_aux=True)(x)
    return jax.lax.stop_gradient((value, aux, gradient))


def gradient(fn, values):
    """Gradient of a scalar with respect to a list of arrays.

    Args:
        fn: ``values -> (scalar, aux)``.
        values: list of arrays.

    Returns:
        ``(aux, gradients)``, both without history.
    """
    gradients, aux = jax.grad(fn, has_aux=True)(values)
    return jax.lax.stop_gradient((aux, gradients))


def update(optimizer, gradients, variables):
    """One step of ``optimizer``, within the scope that holds the variables' values."""
    optimizer.apply(gradients, variables)


def vjp(fn, x):
    """``fn(x)``, a pair of what is pulled back and an aux, and the first one's pullback.

    All are differentiable again with respect to the weights.
    """
    out, pullback, aux = jax.vjp(fn, x, has_aux=True)
    return out, aux, lambda cotangent: pullback(cotangent)[0]


tanh = keras.ops.tanh
clip = keras.ops.clip


def mix(kernel, columns, parts=1):
    """``kernel @ columns``, kernel (A, B) and very many columns (B, M), in ``parts`` of rows."""
    product = keras.ops.matmul(kernel, columns)
    return keras.ops.split(product, parts, axis=0) if parts > 1 else [product]


def loop(n, body, state, unroll=False):
    """Repeat ``state = body(i, state)``, unrolled up to 64 steps (whatever ``unroll`` says)."""
    if n <= _UNROLL:
        for i in range(n):
            state = body(i, state)
        return state
    return keras.ops.fori_loop(0, n, body, state)


def chain(step, state, records):
    """``state = step(state, record)`` for all ``records``, to be differentiated.

    Only each step's state is kept; on the way back the rest is computed again. Of unrolled steps
    XLA would fuse the ways back, so that each goes through those of all later steps once more.

    Args:
        step: ``(state, record) -> state``.
        state, records: nested arrays; records are stacked along a first axis.
    """

    @jax.checkpoint
    def body(state, record):
        return step(state, record), None

    return jax.lax.scan(body, state, records)[0]


# Each batch size anew.
SHAPES_COMPILED = math.inf


def compiled(fn, variables):
    """``fn`` compiled by XLA; the values of ``variables`` travel as arguments."""

    @jax.jit
    def stateless(values, *args):
        with keras.StatelessScope(list(zip(variables, values, strict=True))):
            return fn(*args)

    def call(*args):
        return stateless([v.value for v in variables], *args)

    call.compilations = stateless._cache_size
    return call


@contextlib.contextmanager
def preserve_random_state():
    """Nothing to do: Keras keeps all of JAX's random state in variables."""
    yield


def seed_epoch(seed):
    """Nothing to do: Keras keeps all of JAX's random state in variables."""


def random_state():
    """Nothing: Keras keeps all of JAX's random state in variables."""
    return {}


def set_random_state(arrays):
    """Nothing to do."""


@contextlib.contextmanager
def released():
    yield
    # Its caches keep every program, and with it what the program was traced from.
    jax.clear_caches()


def devices():
    """Names of the devices."""
    return [device.device_kind for device in jax.devices()]


def accelerated():
    """Whether there is a GPU or TPU."""
    return jax.default_backend() != "cpu"


class StepMixin:
    """``train_step`` and ``test_step`` of :class:`RobustClassifier` on JAX."""

    def _settle(self):
        """Give the variables the values that ``fit`` and ``evaluate`` hold in their stead."""
        self.jax_state_sync()

    def _stateless(self, state, compute):
        """``compute()`` as a pure function of ``state``.

        Args:
            state: values of the trainable, non-trainable and metric variables and, in training,
                of the optimizer's.

        Returns:
            ``(result, (non-trainable, metrics))``: the new values.
        """
        groups = [self.trainable_variables, self.non_trainable_variables, self.metrics_variables]
        if len(state) > len(groups):
            groups.append(self.optimizer.variables)
        mapping = []
        for variables, values in zip(groups, state, strict=True):
            mapping += zip(variables, values, strict=True)
        with keras.StatelessScope(mapping, collect_losses=True) as scope:
            result = compute()
        return result, [[scope.get_current_value(v) for v in group] for group in groups[1:3]]

    def train_step(self, state, data):
        trainable, non_trainable, optimizer_variables, metrics = state
        x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)

        x_adv, offsets = None, []
        if self.weight_perturbation is not None and not self._maximizer_alone:
            (x_adv, offsets), (non_trainable, metrics) = self._stateless(
                (trainable, non_trainable, metrics), lambda: self.perturb(x, y, sample_weight)
            )
            trainable = [w + offset for w, offset in zip(trainable, offsets, strict=True)]

        def scaled_loss(trainable, perturbation):
            def compute():
                images = x_adv if perturbation is None else self.perturbed(x, perturbation)
                loss, logs = self.robust_step(x, y, sample_weight, training=True, x_adv=images)
                return self.optimizer.scale_loss(loss), logs

            (loss, logs), new = self._stateless(
                (trainable, non_trainable, metrics, optimizer_variables), compute
            )
            return loss, (logs, new)

        logs = {}
        if not self._maximizer_alone:
            held = (trainable, non_trainable, metrics)
            perturbation, _ = self._stateless(held, lambda: self.perturbation_of(x))
            (gradients, slope), (logs, (non_trainable, metrics)) = jax.grad(
                scaled_loss, (0, 1), has_aux=True
            )(trainable, perturbation)
            if perturbation is not None:
                _, (non_trainable, metrics) = self._stateless(
                    (trainable, non_trainable, metrics), lambda: self.persist(perturbation, slope)
                )
            trainable, optimizer_variables = self.optimizer.stateless_apply(
                optimizer_variables, gradients, trainable
            )
            if offsets:
                trainable = self.restored(trainable, offsets)
            if self.averaging is not None:
                _, (non_trainable, metrics) = self._stateless(
                    (trainable, non_trainable, metrics), self.average_step
                )
        if self._maximizer_alone or self._learns == "alternating":
            more, (non_trainable, metrics) = self._stateless(
                (trainable, non_trainable, metrics), lambda: self.maximizer_step(x, y)
            )
            logs = {**logs, **more}
        return logs, (trainable, non_trainable, optimizer_variables, metrics)

    def test_step(self, state, data):
        trainable, _, _ = state
        x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
        (_, logs), (non_trainable, metrics) = self._stateless(
            state, lambda: self.robust_step(x, y, sample_weight, training=False)
        )
        return logs, (trainable, non_trainable, metrics)
