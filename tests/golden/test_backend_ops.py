"""What a backend replaces for speed: the numbers of the plain operation, and its gradients."""

import numpy as np
import pytest
from keras import ops

from keras_emr import backend
from tests.golden.test_maximizer import TOLERANCE, precision  # noqa: F401

both = pytest.mark.parametrize("precision", ["float32", "float64"], indirect=True)


def value_and_gradients(fn, *inputs):
    """``fn`` and the gradients of ``sum(fn * direction)``."""
    direction = np.random.default_rng(1).normal(size=fn_shape(fn, inputs))

    def weighted(values):
        out = fn(*values)
        return ops.sum(out * ops.convert_to_tensor(direction, out.dtype)), out

    out, gradients = backend.gradient(weighted, [ops.convert_to_tensor(i) for i in inputs])
    return ops.convert_to_numpy(out), [ops.convert_to_numpy(g) for g in gradients], direction


def fn_shape(fn, inputs):
    return tuple(fn(*map(ops.convert_to_tensor, inputs)).shape)


@both
@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("columns", [16, 40, 15, 1])  # in blocks of 8, or not
def test_mix(precision, columns, parts):  # noqa: F811
    rng = np.random.default_rng(0)
    kernel, seen = (rng.normal(size=s).astype(precision) for s in ((6, 4), (4, columns)))

    def mix(kernel, seen):
        found = backend.mix(kernel, seen, parts)
        assert [tuple(part.shape) for part in found] == [(6 // parts, columns)] * parts
        return ops.concatenate(found, axis=0)

    value, (of_kernel, of_seen), direction = value_and_gradients(mix, kernel, seen)
    tolerance = {"rtol": TOLERANCE[precision], "atol": TOLERANCE[precision]}
    np.testing.assert_allclose(value, kernel @ seen, **tolerance)
    np.testing.assert_allclose(of_kernel, direction @ seen.T, **tolerance)
    np.testing.assert_allclose(of_seen, kernel.T @ direction, **tolerance)


@both
def test_tanh(precision):  # noqa: F811
    x = np.array([[-np.inf, -90, -3, -1e-3, -1e-9, 0, 1e-9, 0.3, 2, 90, np.inf]], precision)
    value, (gradient,), direction = value_and_gradients(backend.tanh, x)
    rounding = {"float32": 3e-7, "float64": 1e-15}[precision]
    np.testing.assert_allclose(value, np.tanh(x), rtol=0, atol=rounding)
    want = direction * (1 - np.tanh(x) ** 2)
    np.testing.assert_allclose(gradient, want, rtol=0, atol=4 * rounding)
    assert value[0, 5] == 0  # a pixel without a gradient stays where it is
