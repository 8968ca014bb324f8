"""PyTorch: gradients and the training step (eager, as Keras runs torch)."""

import contextlib

import keras
import torch

# Coordinates of images whose chain of gradients is computed at a time.
_PIECE = 2**14


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


def summed_gradient(fn, values, arrays):
    """Gradient of a sum over examples with respect to a list of tensors.

    Args:
        fn: ``(values, arrays) -> scalar``, a sum over the examples in ``arrays``.
        values: list of tensors.
        arrays: list of tensors with one row per example; ``None`` is passed on.

    Returns:
        List of gradients, without history.
    """
    rows = len(arrays[0])
    at_once = rows
    if arrays[0].device.type == "cpu":
        # Piece by piece: what autograd keeps then stays in the cache, and out of the way of the
        # network's own memory.
        at_once = max(1, _PIECE // arrays[0][0].numel())
    sums = [torch.zeros_like(value) for value in values]
    with torch.enable_grad():
        for begin in range(0, rows, at_once):
            part = [a if a is None else a[begin : begin + at_once] for a in arrays]
            leaves = [value.detach().requires_grad_(True) for value in values]
            found = torch.autograd.grad(
                fn(leaves, part), leaves, allow_unused=True, materialize_grads=True
            )
            sums = [total + gradient for total, gradient in zip(sums, found, strict=True)]
    return sums


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
