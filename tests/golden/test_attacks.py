"""Attacks on linear models: closed-form optima, and every update against a NumPy loop."""

import itertools

import numpy as np
import pytest
from keras import ops

from keras_emr import BIM, FGSM, PGD
from keras_emr.attacks.base import Objective
from keras_emr.defenses import get_defense
from keras_emr.sampling import ExampleSampler, StreamSampler
from tests.golden import reference as ref

D, N = 8, 6
SHAPE = (2, 2, 2)


class Given:
    """A sampler that returns given numbers: ``uniforms`` in [0, 1), and normals, in order.

    The last array of each kind is returned from then on.
    """

    def __init__(self, uniforms=(), normals=()):
        self.queues = {"uniform": list(uniforms), "normal": list(normals)}

    def _next(self, kind, shape):
        queue = self.queues[kind]
        value = queue.pop(0) if len(queue) > 1 else queue[0]
        assert value.shape == tuple(shape)
        return value

    def uniform(self, shape, low=-1.0, high=1.0):
        return ref.tensor(low + (high - low) * self._next("uniform", shape))

    def normal(self, shape):
        return ref.tensor(self._next("normal", shape))


class Linear:
    """Logits ``gate * (x W) + b`` with float64 gradients known by hand."""

    def __init__(self, k=4, n=N, seed=0, gate=None, low=0.0, high=1.0):
        rng = np.random.default_rng(seed)
        self.rng, self.k = rng, k
        self.w, self.b = rng.normal(size=(D, k)) * 2, rng.normal(size=k) * 0.1
        self.x = rng.uniform(low, high, size=(n, *SHAPE))
        self.y = self.logits(self.x).argmax(-1)  # all correct ...
        self.y[n // 2 :] = rng.integers(0, k, n - n // 2)  # ... in the first half
        self.gate = np.ones(n) if gate is None else gate

    def logits(self, x):
        z = x.reshape(len(x), -1) @ self.w
        return getattr(self, "gate", np.ones(len(x)))[:, None] * z + self.b

    def objective(self, name="cross_entropy", dtype="float64"):
        w, b, gate = (ref.tensor(v, dtype) for v in (self.w, self.b, self.gate[:, None]))
        shape = (len(self.x), D)
        return Objective(
            lambda x: gate * (ops.cast(ops.reshape(x, shape), dtype) @ w) + b,
            name,
            ref.tensor(self.x, dtype),
            ref.tensor(self.y, "int32"),
        )

    def gradient(self, name, x):
        z = self.logits(x)
        if name == "cross_entropy":
            dz = ref.softmax(z) - np.eye(self.k)[self.y]
        elif name == "kl":
            dz = ref.softmax(z) - ref.softmax(self.logits(self.x))
        else:
            rest = np.where(np.eye(self.k)[self.y] > 0, -np.inf, z)
            active = ref.at(z, self.y) - rest.max(-1) + 50 > 0
            dz = active[:, None] * (np.eye(self.k)[rest.argmax(-1)] - np.eye(self.k)[self.y])
        return ((self.gate[:, None] * dz) @ self.w.T).reshape(x.shape)


class Random:
    """A sampler in any precision (the package's own draw in floatx)."""

    def __init__(self, dtype):
        self.rng, self.dtype = np.random.default_rng(0), dtype

    def uniform(self, shape, low=-1.0, high=1.0):
        return ref.tensor(self.rng.uniform(low, high, tuple(shape)), self.dtype)

    def normal(self, shape):
        return ref.tensor(self.rng.normal(size=tuple(shape)), self.dtype)


def run(attack, problem, sampler=None, dtype="float64", name="cross_entropy"):
    sampler = Random(dtype) if sampler is None else sampler
    x = ref.tensor(problem.x, dtype)
    return ref.numpy(attack(problem.objective(name, dtype), x, sampler)).astype("float64")


def norms(delta, norm):
    return ref.vector_norm(delta.astype("float64"), norm)


# ---------------------------------------------------------------- objectives


@pytest.mark.parametrize("name", ["cross_entropy", "kl", "margin"])
def test_objective_and_its_gradient(name):
    """The gradient of the sum: every example's own, whatever the size of the batch."""
    problem = Linear()
    moved = problem.x + problem.rng.normal(size=problem.x.shape)
    z, y = problem.logits(moved), problem.y
    want = {
        "cross_entropy": ref.cross_entropy(y, z),
        "kl": ref.kl(problem.logits(problem.x), z),
        "margin": -np.maximum(0, ref.at(z, y) - ref.strongest_rival(z, y) + 50),
    }[name]
    objective = problem.objective(name)
    np.testing.assert_allclose(ref.numpy(objective.loss(ref.tensor(z))), want, rtol=1e-6)
    got = ref.numpy(objective.gradient(ref.tensor(moved)))
    np.testing.assert_allclose(got, problem.gradient(name, moved), rtol=1e-5, atol=1e-6)


def test_margin_objective_saturates_at_kappa_50():
    problem = Linear()
    problem.y[:] = 0
    gaps = np.array([100.0, 7.0, 0.0, -49.0, -50.0, -60.0])  # z_y - max_other
    z = np.stack([gaps, np.zeros(N), np.full(N, -7.0), np.full(N, -9.0)], -1)
    got = ref.numpy(problem.objective("margin").loss(ref.tensor(z)))
    np.testing.assert_allclose(got, [-150.0, -57.0, -50.0, -1.0, 0.0, 0.0], atol=1e-9)


@pytest.mark.parametrize("dtype, rounding", [("float32", 2e-6), ("float64", 1e-14)])
def test_kl_has_no_gradient_at_the_image_itself(dtype, rounding):
    """Zero but for rounding, where 0.001 n away it is not."""
    problem = Linear()
    objective = problem.objective("kl", dtype)
    assert np.abs(ref.numpy(objective.gradient(ref.tensor(problem.x, dtype)))).max() < rounding
    near = problem.x + 0.001 * problem.rng.normal(size=problem.x.shape)
    assert np.median(np.abs(ref.numpy(objective.gradient(ref.tensor(near, dtype))))) > 1e-4


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_kl_does_not_move_from_the_image_itself(norm):
    """Logits that tie exactly, so that nothing is rounded."""
    problem = Linear()
    row = np.array([1.0, -2.0, 3.0, 2.0, -1.0, 0.0, 4.0, -3.0])
    problem.w, problem.b = np.stack([np.roll(row, i) for i in range(4)], -1), np.zeros(4)
    problem.x = np.full((N, *SHAPE), 0.5)
    problem.x[1], problem.x[2], problem.x[3] = 0.25, 0.0, 1.0
    x_adv = run(PGD(0.3, norm, steps=5, start="none"), problem, name="kl")
    assert np.array_equal(x_adv, problem.x)
    x_adv = run(PGD(0.3, norm, steps=5, start="gaussian"), problem, name="kl")
    assert norms(x_adv - problem.x, norm).min() > 0.1


@pytest.mark.parametrize(
    "name, objective, start",
    [
        ("at", "cross_entropy", "uniform"),
        ("trades", "kl", "gaussian"),
        ("mart", "cross_entropy", "gaussian"),
        ("mail-at", "cross_entropy", "gaussian"),
        ("mail-trades", "kl", "gaussian"),
        ("mail-mart", "cross_entropy", "gaussian"),
    ],
)
def test_what_the_defenses_prescribe(name, objective, start):
    attack = PGD(0.1).with_defaults(**get_defense(name).attack_defaults)
    assert (attack.objective, attack.start) == (objective, start)
    kept = PGD(0.1, start="none", objective="margin")
    kept = kept.with_defaults(**get_defense(name).attack_defaults)
    assert (kept.objective, kept.start) == ("margin", "none")


# ---------------------------------------------------------------- closed forms


@pytest.mark.parametrize("epsilon", [8 / 255, 0.3])
def test_linf_reaches_the_worst_case_of_two_classes(epsilon):
    problem = Linear(k=2)
    w_true, w_other = problem.w.T[problem.y], problem.w.T[1 - problem.y]
    direction = np.sign(w_true - w_other).reshape(problem.x.shape)
    best = np.clip(problem.x - epsilon * direction, 0, 1)
    want = ref.cross_entropy(problem.y, problem.logits(best))
    assert (want > ref.cross_entropy(problem.y, problem.logits(problem.x))).all()
    for attack in (
        PGD(epsilon, steps=10),
        PGD(epsilon, steps=10, start="gaussian"),
        PGD(epsilon, steps=10, objective="margin"),
        BIM(epsilon, steps=100),
        FGSM(epsilon),
    ):
        name = attack.objective or "cross_entropy"
        x_adv = run(attack, problem, dtype="float32", name=name)
        np.testing.assert_allclose(x_adv, best, atol=1e-6)
        got = ref.cross_entropy(problem.y, problem.logits(x_adv))
        np.testing.assert_allclose(got, want, rtol=1e-5)


@pytest.mark.parametrize("epsilon", [8 / 255, 0.3])
def test_linf_reaches_the_worst_case_of_many_classes(epsilon):
    """The maximum of a convex loss is a corner of ball and box: try all of them."""
    problem = Linear()
    signs = np.array(list(itertools.product([-1.0, 1.0], repeat=D))).reshape(-1, 1, *SHAPE)
    corners = np.clip(problem.x + epsilon * signs, 0, 1)
    worst = [ref.cross_entropy(problem.y, problem.logits(c)) for c in corners]
    attack = PGD(epsilon, steps=10, restarts=10)
    x_adv = run(attack, problem, ExampleSampler(0, 0, range(N)), dtype="float32")
    got = ref.cross_entropy(problem.y, problem.logits(x_adv))
    np.testing.assert_allclose(got, np.max(worst, 0), rtol=1e-5)


@pytest.mark.parametrize("start", ["uniform", "gaussian", "none"])
def test_l2_reaches_the_worst_case_of_two_classes(start):
    problem, epsilon = Linear(k=2, low=0.4, high=0.6), 0.2
    w = problem.w.T[problem.y] - problem.w.T[1 - problem.y]
    best = problem.x - epsilon * (w / norms(w, "l2")[:, None]).reshape(problem.x.shape)
    assert best.min() > 0 and best.max() < 1  # the box is not active
    x_adv = run(PGD(epsilon, "l2", steps=60, step_size=0.1, start=start), problem)
    np.testing.assert_allclose(x_adv, best, atol=1e-5)
    np.testing.assert_allclose(norms(x_adv - problem.x, "l2"), epsilon, rtol=1e-6)
    if start == "none":
        np.testing.assert_allclose(run(FGSM(epsilon, "l2"), problem), best, atol=1e-6)


# ---------------------------------------------------------------- feasibility


VARIANTS = {
    **{
        f"pgd-{norm}-{start}-{restarts}": (PGD, dict(norm=norm, start=start, restarts=restarts))
        for norm in ("linf", "l2")
        for start in ("uniform", "gaussian", "none")
        for restarts in (1, 2)
    },
    **{
        f"trades-l2-{start}": (
            PGD,
            dict(norm="l2", start=start, box_first=True, noise_at_zero=True),
        )
        for start in ("uniform", "gaussian", "none")
    },
    **{f"bim-{norm}": (BIM, dict(norm=norm)) for norm in ("linf", "l2")},
    **{f"fgsm-{norm}": (FGSM, dict(norm=norm)) for norm in ("linf", "l2")},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_results_are_feasible(variant):
    """Within the ball and [0, 1]; pixels at 0 and 1, and examples without a gradient, included."""
    cls, options = VARIANTS[variant]
    problem = Linear(gate=np.array([1.0, 1, 1, 1, 0, 0]))
    problem.x = np.round(problem.x * 4) / 4
    problem.x[:, 0, 0], problem.x[:, 1, 1] = 0.0, 1.0
    for epsilon in (0.0, 8 / 255, 0.3, 1.0, 5.0):
        attack = cls(epsilon, **options, **({} if cls is FGSM else {"steps": 3}))
        x_adv = run(attack, problem, StreamSampler(0), dtype="float32")
        assert np.isfinite(x_adv).all() and x_adv.min() >= 0 and x_adv.max() <= 1
        size = norms(x_adv - problem.x, options["norm"])
        assert (size <= epsilon + 1e-6).all()
        if epsilon == 0:
            assert np.array_equal(x_adv, problem.x)
        else:
            assert size[:4].min() > 0.5 * min(epsilon, 0.01)
