"""Effective margins: invariance under logit scaling, and distances of a linear model."""

import numpy as np
import pytest

from keras_emr import effective_margins, margin_summary
from tests.golden import reference as ref

K, D, N = 4, 8, 6
SHAPE = (2, 2, 2)


def setup(*hidden, n=N):
    rng = np.random.default_rng(0)
    weights = ref.mlp_weights(rng, D, *hidden, K)
    return weights, rng.uniform(size=(n, *SHAPE)), rng.integers(0, K, n)


def _float32(weights, activation="tanh"):
    return ref.build_mlp([w.astype("float32") for w in weights], activation, SHAPE, "float32")


def _margins(weights, x, y, activation="tanh"):
    """Effective margins in L2 and Linf, and the predicted class's weight norm."""
    z, jacobian, _ = ref.mlp_forward(weights, activation, x)
    margins = np.full((2, *z.shape), np.inf)
    for i, j in np.ndindex(z.shape):
        if j != y[i]:
            w = jacobian[i, y[i]] - jacobian[i, j]
            margins[:, i, j] = (z[i, y[i]] - z[i, j]) / [np.sqrt((w**2).sum()), np.abs(w).sum()]
    return (*margins.min(-1), np.sqrt((ref.at(jacobian, z.argmax(-1)) ** 2).sum(-1)))


def test_3_effective_margins_do_not_change_with_the_scale():
    weights, x, y = setup(7)
    plain = effective_margins(_float32(weights), x.astype("float32"), y, batch_size=4)
    l2, linf, norm = _margins(weights, x, y)
    np.testing.assert_allclose(plain.l2, l2, rtol=1e-4)
    np.testing.assert_allclose(plain.linf, linf, rtol=1e-4)
    np.testing.assert_allclose(plain.weight_norm, norm, rtol=1e-4)
    assert (l2 > 0).any() and (l2 < 0).any()
    for s in (0.25, 64.0):
        model = _float32([*weights[:-2], s * weights[-2], s * weights[-1]])
        scaled = effective_margins(model, x.astype("float32"), y)
        np.testing.assert_allclose(scaled.l2, l2, rtol=1e-4)
        np.testing.assert_allclose(scaled.linf, linf, rtol=1e-4)
        np.testing.assert_allclose(scaled.weight_norm, s * norm, rtol=1e-4)


def test_more_classes_than_are_unrolled():
    rng = np.random.default_rng(1)
    weights = ref.mlp_weights(rng, D, 9, 70)
    x, y = rng.uniform(size=(N, *SHAPE)), rng.integers(0, 70, N)
    got = effective_margins(_float32(weights), x.astype("float32"), y, batch_size=4)
    l2, linf, norm = _margins(weights, x, y)
    np.testing.assert_allclose(got.l2, l2, rtol=1e-4)
    np.testing.assert_allclose(got.linf, linf, rtol=1e-4)
    np.testing.assert_allclose(got.weight_norm, norm, rtol=1e-4)


def test_5_effective_margin_is_the_distance_to_the_hyperplane():
    weights, x, y = setup(n=40)
    margins = effective_margins(_float32(weights), x.astype("float32"), y)
    l2, linf, norm = _margins(weights, x, y)
    np.testing.assert_allclose(margins.l2, l2, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(margins.linf, linf, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(margins.weight_norm, norm, rtol=1e-5)
    # Moving that far along the normal (L2) or the signs (Linf) lands on a tie: a distance.
    flat = x.reshape(40, -1)
    z = flat @ weights[0] + weights[1]
    for distance, direction in (
        (margins.l2, lambda w: w / np.sqrt((w**2).sum())),
        (margins.linf, np.sign),
    ):
        for i in np.flatnonzero(z.argmax(-1) == y):
            moved = [
                flat[i] - distance[i] * direction(weights[0][:, y[i]] - weights[0][:, j])
                for j in range(K)
                if j != y[i]
            ]
            tie = np.array(moved) @ weights[0] + weights[1]
            gaps = tie[:, y[i]] - ref.strongest_rival(tie, np.full(K - 1, y[i]))
            assert abs(gaps.min()) < 1e-4 and (gaps > -1e-4).all()


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_summary(norm):
    weights, x, y = setup(n=40)
    l2, linf, weight_norm = _margins(weights, x, y)
    margins = l2 if norm == "l2" else linf
    epsilon = float(np.sort(margins[margins > 0])[4:6].mean())
    out = margin_summary(_float32(weights), x.astype("float32"), y, epsilon, norm)
    assert out["n"] == 40 and out["norm"] == norm and out["epsilon"] == epsilon
    assert out["share_above_epsilon"] == (margins > epsilon).mean()
    assert 0 < out["share_above_epsilon"] < (margins > 0).mean()
    assert out["effective_margin_l2"] == pytest.approx(l2.mean(), rel=1e-4)
    assert out["effective_margin_linf"] == pytest.approx(linf.mean(), rel=1e-4)
    assert out["effective_weight_norm"] == pytest.approx(weight_norm.mean(), rel=1e-4)
    for name, values in (("l2", l2), ("linf", linf)):
        histogram = out[f"histogram_{name}"]
        assert sum(histogram["counts"]) == 40
        assert histogram["edges"][0] == pytest.approx(values.min(), rel=1e-4)
        assert histogram["edges"][-1] == pytest.approx(values.max(), rel=1e-4)


def test_no_gradient_is_an_infinite_distance():
    """All hidden units of a ReLU network dead, as after a collapse: no boundary anywhere near."""
    weights, x, y = setup(7)
    weights[1][:] = -100.0
    weights[3][:] = [0.5, 0.0, 0.0, 0.0]
    x, y = x.astype("float32"), np.zeros(N, int)
    model = _float32(weights, "relu")
    margins = effective_margins(model, x, y)
    assert np.isposinf(margins.l2).all() and np.isposinf(margins.linf).all()
    assert margin_summary(model, x, y, 0.1)["share_above_epsilon"] == 1.0
