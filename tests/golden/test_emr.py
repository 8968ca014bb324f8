"""Effective margin regularization: the nine identities, values, schedules and presets."""

import keras
import numpy as np
import pytest
from keras import ops

from keras_emr import EffectiveMarginRegularizer, RobustClassifier
from keras_emr.network import Network
from keras_emr.sampling import ExampleSampler, StreamSampler
from tests.golden import reference as ref

FIXED = ["softmax", "predicted", "true", "uniform", "runner_up_difference"]
RANDOM = ["sampled", "rademacher", "sphere"]
K, D, N, MANY = 4, 8, 6, 4000
SHAPE = (2, 2, 2)


def setup(*hidden, activation="tanh", seed=0, n=N):
    """Weights, Keras model, images and labels of a small float64 network."""
    rng = np.random.default_rng(seed)
    weights = ref.mlp_weights(rng, D, *hidden, K)
    model = ref.build_mlp(weights, activation, SHAPE)
    return weights, model, rng.uniform(size=(n, *SHAPE)), rng.integers(0, K, n)


def emr(model, x, y, weighting="softmax", sampler=None, x_clean=None, **options):
    """Per-example penalties of the package, at ``x`` as the adversarial images."""
    regularizer = EffectiveMarginRegularizer(weighting=weighting, **options)
    clean = ref.tensor(x if x_clean is None else x_clean)
    labels = ref.tensor(y, "int32")
    sampler = StreamSampler(0) if sampler is None else sampler
    return ref.numpy(regularizer(Network(model), clean, ref.tensor(x), labels, sampler))


def expected(weights, x, y, weighting, activation="tanh", norm="l2", power=2, t=1.0, center=False):
    z, jacobian, _ = ref.mlp_forward(weights, activation, x)
    if center:
        jacobian = jacobian - (jacobian.mean(1, keepdims=True) if weighting == "exact" else 0)
    if weighting == "exact":
        return ref.penalty(jacobian, None, norm, power)
    c = ref.cotangent(weighting, z, y, t)
    return ref.penalty(jacobian, c - (c.mean(-1, keepdims=True) if center else 0), norm, power)


@pytest.mark.parametrize(
    "norm, power, center",
    [
        ("l2", 2, False),
        ("l2", 2, True),
        ("l2", 1, False),
        ("l1", 2, False),
        ("l1", 1, True),
        ("linf", 2, False),
    ],
)
@pytest.mark.parametrize("weighting", [*FIXED, "exact"])
def test_value(weighting, norm, power, center):
    weights, model, x, y = setup(7, 5)
    got = emr(model, x, y, weighting, norm=norm, power=power, center=center)
    want = expected(weights, x, y, weighting, norm=norm, power=power, center=center)
    assert got.dtype == np.float64 and got.shape == (N,)
    # The square root of power 1 has an epsilon of 1e-12 inside.
    rtol = 1e-6 if center else 1e-9  # Keras's mean of float64 is float32 on JAX and torch
    np.testing.assert_allclose(got, want, rtol, atol=2e-6 if power == 1 else 1e-12)


@pytest.mark.parametrize("temperature", [0.1, 1.0, 40.0])
def test_temperature_acts_on_the_weights_only(temperature):
    weights, model, x, y = setup(7)
    got = emr(model, x, y, temperature=temperature)
    np.testing.assert_allclose(got, expected(weights, x, y, "softmax", t=temperature), rtol=1e-6)


def test_where_it_is_evaluated():
    weights, model, x, y = setup(7)
    x_adv = np.clip(x + 0.3, 0, 1)
    clean, adversarial = (expected(weights, v, y, "softmax") for v in (x, x_adv))
    wanted = {None: adversarial, "adversarial": adversarial, "clean": clean}
    wanted["both"] = (clean + adversarial) / 2
    for at, want in wanted.items():
        np.testing.assert_allclose(emr(model, x_adv, y, x_clean=x, at=at), want, rtol=1e-9)
    regularizer = EffectiveMarginRegularizer()  # nothing attacks: clean images
    got = regularizer(Network(model), ref.tensor(x), None, ref.tensor(y, "int32"), None)
    np.testing.assert_allclose(ref.numpy(got), clean, rtol=1e-9)


def test_1_exact_is_the_frobenius_norm_and_estimators_agree_in_expectation():
    weights, model, x, y = setup(7, n=1)
    _, jacobian, _ = ref.mlp_forward(weights, "tanh", x)
    frobenius = (jacobian**2).sum()
    assert emr(model, x, y, "exact")[0] == pytest.approx(frobenius, rel=1e-9)
    q = ref.cotangent("softmax", ref.mlp_forward(weights, "tanh", x)[0], y)[0]
    energies = (jacobian[0] ** 2).sum(-1)
    for weighting, mean in (
        ("rademacher", frobenius),
        ("sphere", frobenius),
        ("sampled", (q * energies).sum()),
    ):
        draws = emr(model, np.repeat(x, MANY, 0), np.repeat(y, MANY), weighting)
        error = draws.std(ddof=1) / np.sqrt(len(draws))
        assert abs(draws.mean() - mean) < 3 * error, weighting
        assert error < 0.05 * mean
        if weighting == "sampled":
            assert np.abs(draws[:, None] - energies).min(-1).max() < 1e-9


@pytest.mark.parametrize("batch_size", [4, 128])
def test_2_released_is_the_mean_over_the_batch_size(batch_size):
    mean = EffectiveMarginRegularizer(3.0)
    released = EffectiveMarginRegularizer(3.0, reduction="released")
    assert float(mean.scale(0, batch_size)) == 3.0
    assert float(released.scale(0, batch_size)) == 3.0 / batch_size


def test_2_the_training_step_adds_the_released_penalty():
    """One SGD step of a linear model, epsilon = 0: R = (lambda / B) mean ||W q||^2, by hand."""
    rng = np.random.default_rng(3)
    weights = [w.astype("float32") for w in ref.mlp_weights(rng, D, K)]
    y = rng.integers(0, K, 5).astype("int32")
    x = rng.uniform(size=(5, *SHAPE)).astype("float32")
    steps = {}
    for weight in (0.0, 20.0):
        model = ref.build_mlp(weights, shape=SHAPE, dtype="float32")
        penalty = EffectiveMarginRegularizer(weight, temperature=2.0, reduction="released")
        classifier = RobustClassifier(model, "standard", regularizers=[penalty])
        classifier.compile(keras.optimizers.SGD(1.0))
        classifier.fit(x, y, batch_size=5, epochs=1, verbose=0)
        steps[weight] = weights[0] - np.asarray(model.get_weights()[0])
    flat = x.reshape(5, -1).astype(float)
    z = flat @ weights[0] + weights[1]
    base = flat.T @ (ref.softmax(z) - np.eye(K)[y]) / 5
    np.testing.assert_allclose(steps[0.0], base, rtol=1e-4, atol=1e-6)
    q = ref.softmax(z / 2.0)
    want = 20.0 / 5 * 2 * weights[0] @ q.T @ q / 5
    np.testing.assert_allclose(steps[20.0] - steps[0.0], want, rtol=1e-4, atol=1e-5)


def test_3_logit_scaling():
    weights, model, x, y = setup(7)
    s = 3.0
    scaled = ref.build_mlp([*weights[:-2], s * weights[-2], s * weights[-1]], "tanh", SHAPE)
    for weighting in [*FIXED[1:], "exact", "rademacher", "sphere"]:
        got = emr(scaled, x, y, weighting) / emr(model, x, y, weighting)
        np.testing.assert_allclose(got, s**2, rtol=1e-9, err_msg=weighting)
    plain = emr(model, x, y)
    np.testing.assert_allclose(emr(scaled, x, y, temperature=s), s**2 * plain, rtol=1e-9)
    assert np.abs(emr(scaled, x, y) / plain / s**2 - 1).max() > 0.05


def test_4_a_common_function_of_all_logits():
    weights, model, x, y = setup(7)
    common = np.random.default_rng(5).normal(size=(7, 1))
    shifted = ref.build_mlp([*weights[:-2], weights[-2] + common, weights[-1]], "tanh", SHAPE)
    for weighting in [*FIXED, "exact", "rademacher", "sphere"]:
        before, after = (emr(m, x, y, weighting, center=True) for m in (model, shifted))
        np.testing.assert_allclose(after, before, rtol=1e-6, atol=1e-12, err_msg=weighting)
    before, after = (emr(m, x, y, "runner_up_difference") for m in (model, shifted))
    np.testing.assert_allclose(after, before, rtol=1e-9)
    before, after = (emr(m, x, y, "uniform") for m in (model, shifted))
    assert np.abs(after / before - 1).min() > 0.05
    assert emr(model, x, y, "uniform", center=True).max() < 1e-20


def test_5_closed_forms_of_a_linear_model():
    weights, model, x, y = setup()
    w = weights[0]
    for weighting in FIXED:
        q = ref.cotangent(weighting, x.reshape(N, -1) @ w + weights[1], y)
        np.testing.assert_allclose(emr(model, x, y, weighting), ((q @ w.T) ** 2).sum(-1), rtol=1e-9)
    np.testing.assert_allclose(emr(model, x, y, "exact"), (w**2).sum(), rtol=1e-9)


def test_5_closed_forms_of_random_weightings():
    """J = a b^T: the penalty shows (a . v)^2; J = identity: it shows ||v||^2."""
    x, y = np.full((MANY, *SHAPE), 0.5), np.zeros(MANY, int)
    a, b = np.array([1.0, 2.0, 4.0, 8.0]), np.arange(1.0, D + 1)
    model = ref.build_mlp([np.outer(b, a), np.zeros(K)], shape=SHAPE)
    odd = np.sqrt(emr(model, x, y, "rademacher") / (b**2).sum())
    np.testing.assert_allclose(odd, np.round(odd), atol=1e-9)
    assert set(np.round(odd).astype(int)) == {1, 3, 5, 7, 9, 11, 13, 15}
    model = ref.build_mlp([np.eye(D)[:, :K], np.zeros(K)], shape=SHAPE)
    for weighting in ("rademacher", "sphere"):
        np.testing.assert_allclose(emr(model, x, y, weighting), K, rtol=1e-6)
    assert np.ptp(emr(model, x, y, "sphere", norm="l1")) > 0.1


@pytest.mark.parametrize("central", [False, True])
@pytest.mark.parametrize("norm, power", [("l2", 2), ("l1", 2), ("linf", 2), ("l2", 1)])
def test_6_finite_differences_within_a_linear_region(norm, power, central):
    weights, model, x, y = setup(7, activation="relu")
    h = 1e-3
    hidden = ref.mlp_forward(weights, "relu", x)[2][0]
    reach = h * np.abs(weights[0]).sum(0)  # no |direction| entry exceeds 1
    inside = (np.abs(hidden) > reach).all(-1)
    assert inside.sum() > 3
    for weighting in ("softmax", "predicted", "exact"):
        options = {"norm": norm, "power": power}
        got = emr(
            model,
            x,
            y,
            weighting,
            estimator="finite_difference",
            step=h,
            central=central,
            **options,
        )
        want = expected(weights, x, y, weighting, "relu", **options)
        np.testing.assert_allclose(got[inside], want[inside], rtol=1e-6)


@pytest.mark.parametrize(
    "bn_mode, estimator",
    [("inference", "double_backprop"), ("batch", "finite_difference")],
)
def test_7_batch_norm_statistics_stay(bn_mode, estimator):
    model = keras.Sequential(
        [
            keras.Input(SHAPE),
            keras.layers.Flatten(),
            keras.layers.Dense(7, "tanh"),
            keras.layers.BatchNormalization(),
            keras.layers.Dense(K),
        ]
    )
    before = [w.copy() for w in model.get_weights()]
    x = np.random.default_rng(0).uniform(size=(N, *SHAPE)).astype("float32")
    regularizer = EffectiveMarginRegularizer(bn_mode=bn_mode, estimator=estimator)
    labels, network = ref.tensor(np.zeros(N), "int32"), Network(model)

    def total():
        images = ref.tensor(x, "float32")
        return ops.sum(regularizer(network, images, images, labels, ExampleSampler(0, 0, range(N))))

    gradients = ref.weight_gradients(model, total)
    assert max(np.abs(g).max() for g in gradients) > 0
    for old, new in zip(before, model.get_weights(), strict=True):
        assert np.array_equal(old, new)
