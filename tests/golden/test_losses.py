"""Per-example losses of every defense against float64 NumPy, values and gradients."""

import numpy as np
import pytest
from keras import ops

from keras_emr.defenses import get_defense
from tests.golden import reference as ref

SLOPE_BIAS = {"mail-at": (10.0, -0.5), "mail-trades": (2.0, 0.0), "mail-mart": (2.0, 0.0)}
BETA = {"standard": None, "at": None, "trades": 6.0, "mart": 5.0}
MAIL = list(SLOPE_BIAS)
N, K = 16, 10  # few shapes: JAX compiles every operation anew for each
LATE = 100  # an epoch after MAIL's burn-in
# Keras averages float64 in float32 on JAX and torch.
PRECISION = {"constant": 1e-9, "batch": 5e-7}


def _random(rng, n, k):
    return rng.normal(size=(n, k)) * 3, rng.normal(size=(n, k)) * 3


def _large(rng, n, k):
    """p down to e^-60, and q_k* that rounds to 1."""
    return tuple(30 * rng.choice([-1.0, 1.0], (n, k)) + rng.normal(size=(n, k)) for _ in "ab")


def _underflow(rng, n, k):
    """e^-800 is 0 even in float64: 0 log 0 must count as 0."""
    return tuple(400 * rng.choice([-1.0, 1.0], (n, k)) + rng.normal(size=(n, k)) for _ in "ab")


def _ties(rng, n, k):
    return tuple(rng.integers(0, 2, (n, k)).astype(float) for _ in "ab")


CASES = {"random": _random, "large": _large, "underflow": _underflow, "ties": _ties}


def make(case, n=N, k=K, seed=0):
    rng = np.random.default_rng(seed)
    clean, adversarial = CASES[case](rng, n, k)
    return rng.integers(0, k, n), clean, adversarial


def by_hand(logits):
    """(2,) logits of one example as a batch: further classes have probability 0."""
    return np.tile(np.pad(logits, (0, K - 2), constant_values=-1000.0), (N, 1))


def evaluate(defense, y, clean, adversarial, epoch=LATE, dtype="float64"):
    """Loss of the package; logits that a defense says it does not need are withheld."""
    a = ref.tensor(clean, dtype) if defense.needs_clean else None
    b = ref.tensor(adversarial, dtype) if defense.needs_adversarial else None
    return ref.numpy(defense.loss(ref.tensor(y, "int32"), a, b, epoch))


@pytest.mark.parametrize("case, k", [*((case, K) for case in CASES), ("large", 2)])
@pytest.mark.parametrize("name", BETA)
def test_base_methods(name, case, k):
    y, clean, adversarial = make(case, k=k)
    got = evaluate(get_defense(name), y, clean, adversarial)
    want = ref.loss(name, y, clean, adversarial, BETA[name])
    assert got.dtype == np.float64 and got.shape == (N,)
    np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("normalization", ["constant", "batch"])
@pytest.mark.parametrize("margin", ["adversarial", "natural", "difference"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", MAIL)
def test_mail(name, case, margin, normalization):
    y, clean, adversarial = make(case)
    for slope, bias in (SLOPE_BIAS[name], (30.0, -0.07), (5.0, 0.05), (1.0, -1.5)):
        defense = get_defense(
            name, slope=slope, bias=bias, margin=margin, normalization=normalization
        )
        weights = ref.omega(y, clean, adversarial, slope, bias, margin, normalization)
        tensors = [ref.tensor(clean), ref.tensor(adversarial)]
        got = ref.numpy(defense.weights(ref.tensor(y, "int32"), *tensors, LATE))
        np.testing.assert_allclose(got, weights, rtol=PRECISION[normalization])
        got = ref.numpy(defense.loss(ref.tensor(y, "int32"), *tensors, LATE))
        want = ref.loss(name, y, clean, adversarial, 5.0, weights)
        np.testing.assert_allclose(got, want, rtol=PRECISION[normalization], atol=1e-12)


@pytest.mark.parametrize("name", MAIL)
def test_mail_defaults_and_burn_in(name):
    """Epochs 0..75 (0-based) are the base method; 76 is the first reweighted one."""
    y, clean, adversarial = make("random")
    defense = get_defense(name)
    plain = ref.loss(name, y, clean, adversarial, 5.0)
    weights = ref.omega(y, clean, adversarial, *SLOPE_BIAS[name])
    weighted = ref.loss(name, y, clean, adversarial, 5.0, weights)
    assert np.abs(plain - weighted).max() > 0.1
    for epoch, want in ((0, plain), (75, plain), (76, weighted), (119, weighted)):
        for value in (epoch, ops.convert_to_tensor(epoch, dtype="int32")):
            got = evaluate(defense, y, clean, adversarial, value)
            np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-12)
    got = evaluate(get_defense(name, burn_in=3), y, clean, adversarial, 3)
    np.testing.assert_allclose(got, weighted, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", MAIL)
def test_mail_options(name):
    y, clean, adversarial = make("random")
    weights = ref.omega(y, clean, adversarial, *SLOPE_BIAS[name], constant=1.5)
    got = evaluate(get_defense(name, constant=1.5, beta=2.5), y, clean, adversarial)
    want = ref.loss(name, y, clean, adversarial, 2.5, weights)
    np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", MAIL)
def test_mail_with_equal_weights_is_its_base(name):
    y, clean, adversarial = make("random")
    base = name.removeprefix("mail-")
    options = {} if base == "at" else {"beta": 4.0}
    same = get_defense(name, slope=0.0, normalization="batch", beta=4.0)
    tensors = [ref.tensor(y, "int32"), ref.tensor(clean), ref.tensor(adversarial)]
    np.testing.assert_allclose(ref.numpy(same.weights(*tensors, LATE)), 1.0, rtol=1e-14)
    got = evaluate(same, y, clean, adversarial)
    want = evaluate(get_defense(base, **options), y, clean, adversarial)
    np.testing.assert_allclose(got, want, rtol=1e-13)


def test_kl_direction():
    """p = (0.9, 0.1), q = (0.5, 0.5)."""
    y, clean, adversarial = np.zeros(N, int), by_hand(np.log([0.9, 0.1])), by_hand([0.0, 0.0])
    got = evaluate(get_defense("trades", beta=1.0), y, clean, adversarial) + np.log(0.9)
    forward = 0.9 * np.log(0.9 / 0.5) + 0.1 * np.log(0.1 / 0.5)
    backward = 0.5 * np.log(0.5 / 0.9) + 0.5 * np.log(0.5 / 0.1)
    assert abs(forward - backward) > 0.1
    np.testing.assert_allclose(got, forward, rtol=1e-9)
    got = evaluate(get_defense("mart", beta=1.0), y, clean, adversarial)
    want = -np.log(0.5) - np.log(0.5001) + (1.0000001 - 0.9) * forward
    np.testing.assert_allclose(got, want, rtol=1e-9)


def test_kl_sums_over_the_classes():
    """Certain clean prediction, uniform adversarial one: KL = log 10, not log(10) / 10."""
    y, clean, adversarial = np.full(N, 3), 100 * np.eye(K)[[3] * N], np.zeros((N, K))
    got = evaluate(get_defense("trades", beta=6.0), y, clean, adversarial)
    np.testing.assert_allclose(got, 6 * np.log(10), rtol=1e-9)


@pytest.mark.parametrize("case", CASES)
def test_trades_without_beta_is_standard(case):
    y, clean, adversarial = make(case)
    got = evaluate(get_defense("trades", beta=0.0), y, clean, adversarial)
    assert np.array_equal(got, evaluate(get_defense("standard"), y, clean, adversarial))


def logit_gradients(defense, y, clean, adversarial):
    labels = ref.tensor(y, "int32")

    def total(a, b):
        return ops.sum(defense.loss(labels, a, b, LATE))

    return ref.gradients(total, clean, adversarial)


def reference_gradients(name, y, clean, adversarial, beta, omega=None, weight=None):
    """Finite differences; ``omega`` and ``weight`` as functions of the logits, or frozen."""

    def total(a, b):
        w = omega(a, b) if callable(omega) else (1.0 if omega is None else omega)
        return ref.loss(name, y, a, b, beta, w, weight).sum()

    return [
        ref.finite_difference(lambda a: total(a, adversarial), clean),
        ref.finite_difference(lambda b: total(clean, b), adversarial),
    ]


def largest_difference(one, other):
    return max(np.abs(a - b).max() for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("name", BETA)
def test_gradients_of_base_methods(name):
    """Both logits of TRADES and MART get a gradient: nothing is detached."""
    data = make("random")
    got = logit_gradients(get_defense(name), *data)
    want = reference_gradients(name, *data, BETA[name])
    for g, w in zip(got, want, strict=True):
        np.testing.assert_allclose(g, w, rtol=1e-6, atol=1e-8)
    assert (np.abs(got[0]).max() > 1e-3) == (name != "at")
    assert (np.abs(got[1]).max() > 1e-3) == (name != "standard")


def test_mart_weight_is_not_detached():
    data = make("random")
    got = logit_gradients(get_defense("mart"), *data)
    frozen = reference_gradients("mart", *data, 5.0, weight=ref.mart_weight(*data[:2]))
    assert largest_difference(got, reference_gradients("mart", *data, 5.0)) < 1e-7
    assert largest_difference(got, frozen) > 0.1


@pytest.mark.parametrize("normalization", ["constant", "batch"])
@pytest.mark.parametrize("margin", ["adversarial", "natural", "difference"])
@pytest.mark.parametrize("name", MAIL)
def test_mail_weights_are_detached(name, margin, normalization):
    y, clean, adversarial = make("random")

    def omega(a, b):
        return ref.omega(y, a, b, 3.0, 0.1, margin, normalization)

    defense = get_defense(name, slope=3.0, bias=0.1, margin=margin, normalization=normalization)
    got = logit_gradients(defense, y, clean, adversarial)
    data = y, clean, adversarial, 5.0
    frozen = reference_gradients(name, *data, omega(clean, adversarial))
    assert largest_difference(got, frozen) < 1e-6
    assert largest_difference(got, reference_gradients(name, *data, omega)) > 0.05


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("case", ["random", "large", "ties"])
@pytest.mark.parametrize("name", [*BETA, *MAIL])
def test_half_precision_is_widened(name, case, dtype):
    y, clean, adversarial = make(case)
    clean, adversarial = (
        ref.numpy(ops.cast(ref.tensor(z, dtype), "float64")) for z in (clean, adversarial)
    )
    weights = ref.omega(y, clean, adversarial, *SLOPE_BIAS[name]) if name in MAIL else 1.0
    got = evaluate(get_defense(name), y, clean, adversarial, dtype=dtype)
    want = ref.loss(name, y, clean, adversarial, BETA.get(name, 5.0), weights)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=3e-5)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_mart_constants_survive(dtype):
    """1.0001 and 1e-12 are lost in half precision: both logarithms would be infinite."""
    y, clean, adversarial = np.zeros(N, int), by_hand([0.0, 0.0]), by_hand([-30.0, 30.0])
    bce = evaluate(get_defense("mart", beta=0.0), y, clean, adversarial, dtype=dtype)
    np.testing.assert_allclose(bce, 60 - np.log(1e-4 + 1e-12), rtol=1e-4)
    both = evaluate(get_defense("mart", beta=1.0), y, clean, adversarial, dtype=dtype)
    want = 0.5 * (np.log(0.5) - 0.5 * np.log(1e-12) - 0.5 * np.log(1.0))
    np.testing.assert_allclose(both - bce, want, rtol=1e-4)
