"""PyTorch: gradients and the training step (eager, as Keras runs torch)."""

import contextlib

import keras
import torch

from keras_emr.backend import torch_processes as replicas


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


class _Tanh(torch.autograd.Function):
    # torch's own takes ten times its sigmoid's time on CPU, a sixth of a learned attack's cells.
    @staticmethod
    def forward(ctx, x):
        out = x.mul(2).sigmoid_().mul_(2).sub_(1)
        ctx.save_for_backward(out)
        return out

    @staticmethod
    def backward(ctx, gradient):
        (out,) = ctx.saved_tensors
        return torch.ops.aten.tanh_backward(gradient, out)


def tanh(x):
    """Hyperbolic tangent as ``2 sigmoid(2 x) - 1`` on CPU: exact to rounding of 1."""
    return _Tanh.apply(x) if x.device.type == "cpu" else torch.tanh(x)


class _Mix(torch.autograd.Function):
    # The kernel's gradient is a product as long as the columns are many and a few numbers wide,
    # for which one core would be used. In blocks all are.
    _BLOCKS = 8

    @staticmethod
    def forward(ctx, kernel, columns):
        ctx.save_for_backward(kernel, columns)
        return kernel @ columns

    @staticmethod
    def backward(ctx, gradient):
        kernel, columns = ctx.saved_tensors
        of_kernel = of_columns = None
        if ctx.needs_input_grad[0]:
            if columns.shape[1] % _Mix._BLOCKS:
                of_kernel = gradient @ columns.t()
            else:
                size = (-1, _Mix._BLOCKS, columns.shape[1] // _Mix._BLOCKS)
                blocks = columns.reshape(size).permute(1, 2, 0)
                of_kernel = torch.bmm(gradient.reshape(size).transpose(0, 1), blocks).sum(0)
        if ctx.needs_input_grad[1]:
            of_columns = kernel.t() @ gradient
        return of_kernel, of_columns


def mix(kernel, columns):
    """``kernel @ columns`` for a kernel (A, B) and very many columns (B, M)."""
    return _Mix.apply(keras.ops.convert_to_tensor(kernel), columns)


class _Relu(torch.autograd.Function):
    # With its gradient written out, for a second derivative that ends there: torch's own goes on
    # from a gradient to what the function was applied to, with zeros. So for those below. What no
    # gradient comes from passes none on: torch would make it zeros, and send them to the image.
    @staticmethod
    def forward(ctx, x, slope):
        ctx.set_materialize_grads(False)
        y = torch.nn.functional.leaky_relu(x, slope) if slope else torch.relu(x)
        ctx.slope = slope
        ctx.save_for_backward(y)  # of the same sign as x
        return y

    @staticmethod
    def backward(ctx, dy):
        if dy is None:
            return None, None
        y = ctx.saved_tensors[0].detach()
        if not ctx.slope:
            return torch.ops.aten.threshold_backward(dy, y, 0), None
        return torch.ops.aten.leaky_relu_backward(dy, y, ctx.slope, True), None


class _MaxPool(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, size):
        ctx.set_materialize_grads(False)
        y, places = torch.ops.aten.max_pool2d_with_indices(x, size, size)
        ctx.size = size
        ctx.save_for_backward(x, places)
        return y

    @staticmethod
    def backward(ctx, dy):
        if dy is None:
            return None, None
        x, places = ctx.saved_tensors
        back = torch.ops.aten.max_pool2d_with_indices_backward
        return back(dy, x.detach(), ctx.size, ctx.size, [0, 0], [1, 1], False, places), None


def _relu(x):
    return _Relu.apply(x, 0.0)


def _max_pool(x, size):
    return _MaxPool.apply(x.permute(0, 3, 1, 2), list(size)).permute(0, 2, 3, 1)


def cheaper(twice):
    """Functions whose results cost less to differentiate, by name."""
    return {"relu": _relu, "leaky_relu": _Relu.apply, "max_pool": _max_pool} if twice else {}


def clip(x, low, high):
    """``x`` within two numbers. Keras's own copies them to the device, and waits for it."""
    return torch.clamp(keras.ops.convert_to_tensor(x), low, high)


def loop(n, body, state, unroll=False):
    """Repeat ``state = body(i, state)``."""
    for i in range(n):
        state = body(i, state)
    return state


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
