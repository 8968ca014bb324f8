"""PyTorch: gradients and the training step (eager, as Keras runs torch)."""

import contextlib

import keras
import torch

from keras_emr.backend import torch_processes as replicas
from keras_emr.backend.torch_layers import cheaper, mix, tanh  # noqa: F401


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
    """``fn(x)``, a pair of what is pulled back and an aux, and the first one's pullback.

    All are differentiable again with respect to the weights.
    """
    # Evaluation runs under `no_grad`; without weights to train there is no second derivative.
    second_order = torch.is_grad_enabled()
    with torch.enable_grad():
        x = x.detach().requires_grad_(True)
        out, aux = fn(x)

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

    return out, aux, pullback


def clip(x, low, high):
    """``x`` within two numbers. Keras's own copies them to the device, and waits for it."""
    return torch.clamp(keras.ops.convert_to_tensor(x), low, high)


def loop(n, body, state, unroll=False):
    """Repeat ``state = body(i, state)``."""
    for i in range(n):
        state = body(i, state)
    return state


chain = None  # the way back goes through the steps as they were made


SHAPES_COMPILED = 0


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
    torch.manual_seed(seed + replicas.rank())  # other masks for other rows


def random_state():
    """torch's global streams as NumPy arrays: ``{device}``, of process i > 0 ``{device}@{i}``.

    All processes call this together.
    """
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states |= {f"cuda{i}": s for i, s in enumerate(torch.cuda.get_rng_state_all())}
    every = replicas.of_all({name: state.numpy() for name, state in states.items()})
    return {
        f"{name}@{i}" if i else name: state
        for i, found in enumerate(every)
        for name, state in found.items()
    }


def set_random_state(arrays):
    """Set this process's streams to what :func:`random_state` gave.

    What is of a device that is not here is left out. A process that was not there before keeps the
    streams that :func:`seed_epoch` gave it.
    """
    for name, state in arrays.items():
        device, _, process = name.partition("@")
        if int(process or 0) != replicas.rank():
            continue
        state = torch.from_numpy(state.copy())
        if device == "cpu":
            torch.set_rng_state(state)
        elif int(device.removeprefix("cuda")) < torch.cuda.device_count():
            torch.cuda.set_rng_state(state, int(device.removeprefix("cuda")))


def released():
    return contextlib.nullcontext()  # it compiles nothing


def devices():
    """Names of the devices."""
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return ["CPU", *gpus]


def accelerated():
    """Whether there is a GPU."""
    return torch.cuda.is_available()


class StepMixin:
    """``train_step`` and ``test_step`` of :class:`RobustClassifier` on torch."""

    def _settle(self):
        """Nothing to do: variables hold their values during ``fit``."""

    def train_step(self, data):
        x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
        if self._maximizer_alone:
            return self.maximizer_step(x, y)
        x_adv, offsets = None, []
        if self.weight_perturbation is not None:
            x_adv, offsets = self.perturb(x, y, sample_weight)
            with torch.no_grad():
                self.move_weights(offsets, 1)
        perturbation, sources = self.perturbation_of(x), []
        if perturbation is not None:
            sources = [perturbation.requires_grad_(True)]
            x_adv = self.perturbed(x, perturbation)
        loss, logs = self.robust_step(x, y, sample_weight, training=True, x_adv=x_adv)
        weights = self.trainable_weights
        sources += [w.value for w in weights]
        gradients = list(
            torch.autograd.grad(self.optimizer.scale_loss(loss), sources, allow_unused=True)
        )
        with torch.no_grad():
            if perturbation is not None:
                self.persist(perturbation.detach(), gradients.pop(0))
            self.optimizer.apply(replicas.total(gradients), weights)
            replicas.average_statistics(self.model)
            if offsets:
                self.move_weights(offsets, -1)
            self.average_step()
        if self._learns == "alternating":
            logs |= self.maximizer_step(x, y)
        return logs

    def test_step(self, data):
        x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
        return self.robust_step(x, y, sample_weight, training=False)[1]
