"""PyTorch: functions of layers with derivatives of their own."""

import keras
import torch


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


def mix(kernel, columns, parts=1):
    """``kernel @ columns`` for a kernel (A, B) and very many columns (B, M), in ``parts`` of rows.

    Products of their own: on the way back those of a joint one would be copied together again.
    """
    kernel = keras.ops.convert_to_tensor(kernel)
    return [_Mix.apply(rows, columns) for rows in kernel.chunk(parts)]


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


# Keras copies what goes into a convolution or a pooling from (N, H, W, C) to (N, C, H, W), and for
# a convolution back again. A permuted tensor is what PyTorch calls channels last: as it should be.


def _pooling(apply):
    def max_pool(x, size):
        return apply(x.permute(0, 3, 1, 2), list(size)).permute(0, 2, 3, 1)

    return max_pool


def _arranged(kernel):
    """(H, W, I, O) as PyTorch's (O, I, H, W), channels last: one transposed matrix, as a copy of
    four axes takes twice the time."""
    *window, channels, filters = kernel.shape
    rows = kernel.reshape(-1, filters).t().contiguous()
    return rows.reshape(filters, *window, channels).permute(0, 3, 1, 2)


def _conv(x, kernel, bias, strides, padding):
    x = x.permute(0, 3, 1, 2)
    around = [0, 0]
    if padding == "same":
        sides = zip(x.shape[2:], kernel.shape[2:], strides, strict=True)
        missing = [max((-(-n // s) - 1) * s + k - n, 0) for n, k, s in sides]
        if any(m % 2 for m in missing):  # one more behind than before
            (top, left), (bottom, right) = [m // 2 for m in missing], [-(-m // 2) for m in missing]
            x = torch.nn.functional.pad(x, (left, right, top, bottom))
        else:
            around = [m // 2 for m in missing]
    y = torch.nn.functional.conv2d(x, kernel, bias, strides, around)
    return y.permute(0, 2, 3, 1)


def _batch_norm(x, scale, offset, mean, variance, epsilon, training):
    x = x.permute(0, 3, 1, 2)
    # Not the statistics themselves, which a training pass may change before this one's way back.
    known = (None, None) if training else (mean.clone(), variance.clone())
    y, *found = torch.native_batch_norm(x, scale, offset, *known, training, 0.0, epsilon)
    if training:
        mean, inverse = (statistic.detach() for statistic in found)
        variance = inverse.pow(-2) - epsilon
    return y.permute(0, 2, 3, 1), mean, variance


def cheaper(twice):
    """Functions whose results cost less, or cost less to differentiate, by name."""
    layers = {"conv": _conv, "arranged": _arranged, "batch_norm": _batch_norm}
    if not twice:
        return {**layers, "max_pool": _pooling(torch.nn.functional.max_pool2d)}
    rectifiers = {"relu": _relu, "leaky_relu": _Relu.apply}
    return {**layers, **rectifiers, "max_pool": _pooling(_MaxPool.apply)}
