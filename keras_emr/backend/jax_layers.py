"""JAX: functions of layers with derivatives of their own."""

import functools

import jax


def _max_pool(x, size):
    """Max pooling by comparisons: XLA's own gradient of it is slow.

    As there, the first of equal pixels gets the gradient, and NaN is larger than any number.
    """
    rows, columns = (side - side % window for side, window in zip(x.shape[1:3], size, strict=True))
    best = None
    for i in range(size[0]):
        for j in range(size[1]):
            part = x[:, i : rows : size[0], j : columns : size[1]]
            if best is None:
                best = part
            else:
                best = jax.numpy.where((best >= part) | (best != best), best, part)
    return best


def _convolutions(window):
    """``conv(x, kernel)`` of a window's shape, whose derivatives of any order are its three kinds.

    ``<conv(x, k), dy>`` is linear in all three, so that a derivative of a convolution, of its input
    gradient or of its kernel gradient is one of these again. JAX's own second derivatives are
    convolutions of the same value in shapes for which XLA has no fast code.
    """
    axes = ("NHWC", "HWIO", "NHWC")

    def plain(x, k):
        return jax.lax.conv_general_dilated(x, k, dimension_numbers=axes, **window)

    @jax.custom_vjp
    def conv(x, k):
        return plain(x, k)

    @functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
    def of_input(k, dy, shape):
        return jax.linear_transpose(lambda x: plain(x, k), jax.ShapeDtypeStruct(shape, dy.dtype))(
            dy
        )[0]

    @functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
    def of_kernel(x, dy, shape):
        return jax.linear_transpose(lambda k: plain(x, k), jax.ShapeDtypeStruct(shape, dy.dtype))(
            dy
        )[0]

    def conv_back(kept, dy):
        x, k = kept
        return of_input(k, dy, x.shape), of_kernel(x, dy, k.shape)

    def of_input_back(shape, kept, dx):
        k, dy = kept
        return of_kernel(dx, dy, k.shape), conv(dx, k)

    def of_kernel_back(shape, kept, dk):
        x, dy = kept
        return of_input(dk, dy, x.shape), conv(x, dk)

    conv.defvjp(lambda x, k: (plain(x, k), (x, k)), conv_back)
    of_input.defvjp(lambda k, dy, shape: (of_input(k, dy, shape), (k, dy)), of_input_back)
    of_kernel.defvjp(lambda x, dy, shape: (of_kernel(x, dy, shape), (x, dy)), of_kernel_back)
    return conv


def _conv(x, kernel, bias, strides, padding):
    window = {"window_strides": strides, "padding": padding.upper()}
    y = _convolutions(window)(x, kernel)
    return y if bias is None else y + bias


def cheaper(twice):
    """Functions whose results cost less to differentiate, by name."""
    return {"max_pool": _max_pool, **({"conv": _conv} if twice else {})}
