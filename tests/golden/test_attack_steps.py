"""PGD step by step against a NumPy loop with the same random numbers, and its defaults."""

import math

import numpy as np
import pytest
from keras import ops

from keras_emr import BIM, FGSM, PGD
from keras_emr.attacks.base import Objective
from tests.golden import reference as ref
from tests.golden.test_attacks import SHAPE, D, Given, Linear, N, norms, run

GATE = np.array([1.0, 1.0, 1.0, 1.0, 0.0, 0.0])  # the last two examples have no gradient


def ball_l2(delta, epsilon):
    size = norms(delta, "l2").reshape(-1, 1, 1, 1)
    return delta * np.minimum(1, epsilon / np.maximum(size, 1e-300))


def linf_step(problem, name, v, epsilon, alpha, noise):
    v = v + alpha * np.sign(problem.gradient(name, v))
    return np.clip(np.clip(v, problem.x - epsilon, problem.x + epsilon), 0, 1)


def l2_step(problem, name, v, epsilon, alpha, noise):
    """C.2: normalised step, ball, box; a zero gradient stands still."""
    g = problem.gradient(name, v)
    delta = v - problem.x + alpha * g / (norms(g, "l2") + 1e-10).reshape(-1, 1, 1, 1)
    return np.clip(problem.x + ball_l2(delta, epsilon), 0, 1)


def trades_l2_step(problem, name, v, epsilon, alpha, noise):
    """A.3: a zero gradient is replaced by (not normalised) noise; box, then ball."""
    g = problem.gradient(name, v)
    size = norms(g, "l2").reshape(-1, 1, 1, 1)
    direction = np.where(size > 0, g / np.where(size > 0, size, 1), noise)
    boxed = np.clip(v + alpha * direction, 0, 1)
    return problem.x + ball_l2(boxed - problem.x, epsilon)


TRADES = {"box_first": True, "noise_at_zero": True}
UPDATES = {
    "linf": (linf_step, {"norm": "linf"}),
    "l2": (l2_step, {"norm": "l2"}),
    "trades-l2": (trades_l2_step, {"norm": "l2", **TRADES}),
}


@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize(
    "name, epsilon, alpha, start",
    [
        ("cross_entropy", 0.3, 0.07, "uniform"),
        ("cross_entropy", 0.3, 0.07, "gaussian"),
        ("cross_entropy", 0.5, 0.2, "none"),
        ("margin", 0.5, 0.2, "uniform"),
        ("margin", 0.3, 0.07, "none"),
        ("kl", 0.3, 0.07, "gaussian"),
    ],
)
def test_every_step(name, epsilon, alpha, update, start):
    step, options = UPDATES[update]
    problem = Linear(gate=GATE)
    rng = np.random.default_rng(7)
    normals = [rng.normal(size=(N, *SHAPE)), rng.normal(size=(N, *SHAPE))]
    noise = normals[-1] if start != "none" else normals[0]
    uniforms = [rng.uniform(size=N) if "l2" in update else rng.uniform(size=(N, *SHAPE))]

    def sampler():
        return Given(uniforms, normals if start != "none" else normals[:1])

    if start == "gaussian":
        v = problem.x + 0.001 * normals[0]
    elif start == "none":
        v = problem.x
    elif update == "linf":
        v = np.clip(problem.x + epsilon * (2 * uniforms[0] - 1), 0, 1)
    else:
        size = norms(normals[0], "l2").reshape(-1, 1, 1, 1)
        v = problem.x + epsilon * uniforms[0].reshape(-1, 1, 1, 1) * normals[0] / size
        v = np.clip(v, 0, 1)
    attack = PGD(epsilon, steps=6, step_size=alpha, start=start, **options)
    objective, x = problem.objective(name), ref.tensor(problem.x)
    state = attack.begin(objective, x, attack.draw(x, sampler()))
    np.testing.assert_allclose(ref.numpy(state[0]), v, atol=1e-6)
    path = 0.0
    for _ in range(6):
        state = attack.step(objective, x, state)
        new = step(problem, name, v, epsilon, alpha, noise)
        np.testing.assert_allclose(ref.numpy(state[0]), new, atol=2e-6)
        path, v = path + np.abs(new - v).max(), new
    assert path > alpha / 2
    np.testing.assert_allclose(run(attack, problem, sampler(), name=name), v, atol=2e-6)


def test_trades_l2_divides_by_the_norm_itself():
    """A confident prediction: ||g|| is about 1e-12, yet the step has its full length."""
    problem = Linear()
    problem.w, problem.b, problem.x[:] = 0.2 * problem.w, np.array([22.0, 0.0, 0.0, 0.0]), 0.5
    v = problem.x + 0.001 * problem.rng.normal(size=problem.x.shape)
    size = norms(problem.gradient("kl", v), "l2")
    assert size.min() > 1e-13 and size.max() < 1e-11
    attack = PGD(0.3, "l2", step_size=0.1, start="gaussian", objective="kl", **TRADES)
    state = ref.tensor(v), ref.tensor(np.zeros(v.shape))
    moved = attack.step(problem.objective("kl"), ref.tensor(problem.x), state)[0]
    np.testing.assert_allclose(norms(ref.numpy(moved) - v, "l2"), 0.1, rtol=1e-2)


def test_gaussian_start_is_not_clipped():
    problem = Linear()
    problem.x[:, 0], problem.x[:, 1] = 0.0, 1.0
    noise = np.random.default_rng(1).normal(size=problem.x.shape)
    for norm in ("linf", "l2"):
        # Nor is it projected: 0.001 n is far outside this ball.
        attack = PGD(1e-5, norm, start="gaussian")
        drawn = attack.draw(ref.tensor(problem.x), Given(normals=[noise]))
        got = ref.numpy(attack.begin(None, ref.tensor(problem.x), drawn)[0])
        np.testing.assert_allclose(got, problem.x + 0.001 * noise, atol=1e-7)
        assert got.min() < -1e-4 and got.max() > 1.0001


def test_uniform_start_is_clipped():
    problem = Linear()
    problem.x[:, 0], problem.x[:, 1] = 0.0, 1.0
    uniform = np.random.default_rng(1).uniform(size=problem.x.shape)
    attack, x = PGD(0.3, start="uniform"), ref.tensor(problem.x)
    got = attack.begin(None, x, attack.draw(x, Given([uniform])))[0]
    want = np.clip(problem.x + 0.3 * (2 * uniform - 1), 0, 1)
    np.testing.assert_allclose(ref.numpy(got), want, atol=1e-6)


def test_a_zero_gradient_entry_does_not_move():
    problem = Linear()
    problem.w[::2] = 0.0  # every other pixel is unused
    problem.x = problem.x.astype("float32").astype("float64")
    for attack in (PGD(0.1, steps=3, start="none"), FGSM(0.1), BIM(0.1, steps=3)):
        delta = (run(attack, problem, dtype="float32") - problem.x).reshape(N, -1)
        assert not delta[:, ::2].any()
        assert (np.abs(delta[:, 1::2]) > 0).mean() > 0.9
    still = Linear(gate=GATE)
    still.x = problem.x
    for norm in ("linf", "l2"):
        x_adv = run(PGD(0.1, norm, steps=3, start="none"), still, dtype="float32")
        assert np.array_equal(x_adv[4:], still.x[4:])
        assert norms(x_adv[:4] - still.x[:4], norm).min() > 0.01


def test_restarts_merge_by_prediction():
    """A run with a lower loss that fools beats one with a higher loss that does not."""
    high_right, low_wrong = [1.0, 0.99, 0.99, 0.99], [1.0, 1.2, -9.0, -9.0]
    low_right, high_wrong = [5.0, 0.0, 0.0, 0.0], [0.0, 9.0, 0.0, 0.0]
    # Logits right of and left of 0.5, and which side must win.
    table = np.array(
        [
            [high_right, low_wrong],
            [low_wrong, high_right],
            [high_right, low_right],
            [low_right, high_right],
            [low_right, high_wrong],
            [high_wrong, high_right],
        ]
    )
    winner = np.array([0.2, 0.8, 0.8, 0.2, 0.2, 0.8])
    y = np.zeros(N, int)
    losses = np.stack([ref.cross_entropy(y, table[:, side]) for side in (0, 1)])
    assert losses[0, 0] > losses[1, 0] and losses[1, 1] > losses[0, 1]

    class Sides(Linear):
        def objective(self, name, dtype):
            right, left = ref.tensor(table[:, 0], dtype), ref.tensor(table[:, 1], dtype)

            def logits(x):
                v = ops.reshape(x, (N, D))[:, :1]
                return ops.where(v > 0.5, right, left) + 0.0 * v

            return Objective(logits, name, ref.tensor(self.x, dtype), ref.tensor(y, "int32"))

    problem = Sides()
    problem.x, problem.y = np.full((N, *SHAPE), 0.5), y
    right, left = np.ones((N, *SHAPE)), np.zeros((N, *SHAPE))
    attack = PGD(0.3, steps=2, start="uniform", restarts=3)
    for draws in ([right, left, right], [left, right, left], [right, right, left]):
        x_adv = run(attack, problem, Given(draws))
        want = np.broadcast_to(winner[:, None], (N, D))
        np.testing.assert_allclose(x_adv.reshape(N, D), want, atol=1e-6)


def test_default_steps_of_bim():
    """Kurakin: alpha = 1/255 and min(255 eps + 4, 1.25 * 255 eps) steps, rounded up."""
    assert BIM(8 / 255).steps == 10
    assert BIM(2 / 255).steps == 3
    for k in range(1, 65):
        exact = min(4 * (k + 4), 5 * k)  # quarters
        assert BIM(k / 255).steps == math.ceil(exact / 4), k
    assert BIM(8 / 255).alpha == 1 / 255
    assert BIM(0.0).steps >= 1
    assert BIM(8 / 255, steps=7).steps == 7


def test_default_step_sizes():
    assert PGD(0.5, "l2", steps=10).alpha == pytest.approx(2 * 0.5 / 10)
    assert PGD(0.3, steps=40).alpha == pytest.approx(2.5 * 0.3 / 40)
    assert FGSM(0.3).alpha == 0.3 and FGSM(0.3).steps == 1
    assert PGD(0.3, steps=40, step_size=0.01).alpha == 0.01
