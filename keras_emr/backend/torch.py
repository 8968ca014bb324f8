"""PyTorch: gradients and the training step (eager, as Keras runs torch)."""

import contextlib

import keras
import torch


def value_and_grad(fn, x):
    """Per-example value of ``fn`` and the input gradient of its sum, both without history.

    Args:
        fn: ``x -> (value (N,), aux)``.
        x: float tensor (N, ...).

    Returns:
        ``(value, aux, gradient)``; the gradient has the shape of ``x``.
    """
    with torch.enable_grad():
        x = x.detach().requires_grad_(True)
        value, aux = fn(x)
        total = value.sum()
        if total.requires_grad:
            # Only the input gradient: `backward()` would compute the weights' as well.
            (gradient,) = torch.autograd.grad(total, [x], allow_unused=True, materialize_grads=True)
        else:
            gradient = torch.zeros_like(x)
    aux = keras.tree.map_structure(lambda t: t.detach(), aux)
    return value.detach(), aux, gradient.detach()


def gradient(fn, values):
    """Gradient of a scalar with respect to a list of tensors.

    Args:
        fn: ``values -> (scalar, aux)``.
        values: list of tensors.

    Returns:
        ``(aux, gradients)``, both without history.
    """
    with torch.enable_grad():
        values = [value.detach().requires_grad_(True) for value in values]
        scalar, aux = fn(values)
        gradients = torch.autograd.grad(scalar, values, allow_unused=True, materialize_grads=True)
    return keras.tree.map_structure(lambda t: t.detach(), (aux, list(gradients)))


def update(optimizer, gradients, variables):
    """One step of ``optimizer``."""
    with torch.no_grad():
        optimizer.apply(gradients, variables)


def vjp(fn, x):
    """``fn(x)`` and its pullback; both differentiable again with respect to the weights."""
    # Evaluation runs under `no_grad`; without weights to train there is no second derivative.
    second_order = torch.is_grad_enabled()
    with torch.enable_grad():
        x = x.detach().requires_grad_(True)
        out = fn(x)

    def pullback(cotangent):
        with torch.enable_grad():
            (gradient,) = torch.autograd.grad(
                out,
                [x],
                grad_outputs=cotangent,
                create_graph=second_order,
                retain_graph=True,
                allow_unused=True,
                materialize_grads=True,
            )
        return gradient

    return out, pullback


def loop(n, body, state, unroll=False):
    """Repeat ``state = body(i, state)``."""
    for i in range(n):
        state = body(i, state)
    return state


def compiled(fn, variables):
    """``fn`` itself, without recording weight gradients: Keras runs torch eagerly."""

    def call(*args):
        with torch.no_grad():
            return fn(*args)

    return call


@contextlib.contextmanager
def preserve_random_state():
    """Keep torch's global stream: its dropout does not use Keras's seeds."""
    with torch.random.fork_rng():
        yield


def seed_epoch(seed):
    """Set torch's global stream, so that an epoch's dropout can be repeated on resume."""
    torch.manual_seed(seed)


def devices():
    """Names of the devices."""
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return ["CPU", *gpus]


class StepMixin:
    """``train_step`` and ``test_step`` of :class:`RobustClassifier` on torch."""

    def train_step(self, data):
        x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
        if self._maximizer_alone:
            return self.maximizer_step(x, y)
        loss, logs = self.robust_step(x, y, sample_weight, training=True)
        weights = self.trainable_weights
        gradients = torch.autograd.grad(
            self.optimizer.scale_loss(loss), [w.value for w in weights], allow_unused=True
        )
        with torch.no_grad():
            self.optimizer.apply(list(gradients), weights)
        if self._learns == "alternating":
            logs |= self.maximizer_step(x, y)
        return logs

    def test_step(self, data):
        x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
        return self.robust_step(x, y, sample_weight, training=False)[1]
