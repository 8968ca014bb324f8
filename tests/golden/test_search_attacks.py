"""APGD, the line search and the ODI start: against NumPy loops, example by example."""

import keras
import numpy as np
import pytest
from keras import ops

import keras_emr as ke
from keras_emr import APGD, PGD, LineSearch, backend
from keras_emr.attacks import ATTACKS
from keras_emr.attacks.apgd import State, windows
from keras_emr.attacks.base import Objective
from keras_emr.evaluation.scorecard import describe_attack
from tests.builders import assert_same, images, snapshot
from tests.golden import reference as ref
from tests.golden.test_attacks import SHAPE, D, Given, Linear, Random, norms, run

BACKEND = keras.backend.backend()


@pytest.fixture
def float64(monkeypatch):
    """Keras's own maximum and minimum give float32 on torch, whatever their input."""
    if BACKEND == "torch":
        import torch

        for name in ("maximum", "minimum"):
            native = getattr(torch, name)
            monkeypatch.setattr(
                ops, name, lambda a, b, f=native: f(a, torch.as_tensor(b, dtype=a.dtype))
            )


def _sin(a):
    """The backend's own: Keras's runs in float32 on JAX, whatever its input."""
    if BACKEND == "jax":
        import jax

        return jax.numpy.sin(a)
    return ops.sin(a)


class Wavy:
    """Logits ``sin(x A + a) B``: many local maxima. In NumPy for one example at a time.

    ``lead``: added to the logit of an example's label, so that some examples cannot be fooled.
    """

    def __init__(self, n=12, hidden=12, k=4, frequency=4.0, lead=12.0, seed=0):
        rng = np.random.default_rng(seed)
        self.a, self.bias = rng.normal(size=(D, hidden)) * frequency, rng.normal(size=hidden)
        self.b = rng.normal(size=(hidden, k))
        self.x, self.n, self.k = rng.uniform(size=(n, *SHAPE)), n, k
        z = np.sin(self.x.reshape(n, D) @ self.a + self.bias) @ self.b
        self.y, self.lead = z.argmax(-1), np.linspace(0, lead, n)

    def rows(self, rows):
        part = Wavy()
        part.__dict__.update(self.__dict__)
        part.x, part.y, part.lead = self.x[rows], self.y[rows], self.lead[rows]
        part.n = len(rows)
        return part

    def objective(self, name="cross_entropy", dtype="float64"):
        lead = self.lead[:, None] * np.eye(self.k)[self.y]
        a, bias, b, lead = (ref.tensor(v, dtype) for v in (self.a, self.bias, self.b, lead))
        return Objective(
            lambda x: _sin(ops.reshape(x, (-1, D)) @ a + bias) @ b + lead,
            name,
            ref.tensor(self.x, dtype),
            ref.tensor(self.y, "int32"),
        )

    def look(self, name, i, v):
        """Objective, gradient (D,) and prediction of example ``i`` at ``v`` (D,)."""
        phase, y = v @ self.a + self.bias, self.y[i]
        true = np.eye(self.k)[y]
        z = np.sin(phase) @ self.b + self.lead[i] * true
        p = np.exp(z - z.max())
        if name == "cross_entropy":
            value, dz = np.log(p.sum()) + z.max() - z[y], p / p.sum() - true
        else:
            rival = np.where(true > 0, -np.inf, z).argmax()
            value, dz = -max(0, z[y] - z[rival] + 50), np.eye(self.k)[rival] - true
        return value, self.a @ (np.cos(phase) * (self.b @ dz)), z.argmax()


def project(u, x, epsilon, norm):
    if norm == "linf":
        return np.clip(np.clip(u, x - epsilon, x + epsilon), 0, 1)
    length = np.sqrt(((u - x) ** 2).sum())
    return np.clip(x + (u - x) / (length + 1e-12) * min(epsilon, length), 0, 1)


def direction(g, norm):
    return np.sign(g) if norm == "linf" else g / (np.sqrt((g**2).sum()) + 1e-12)


# ---------------------------------------------------------------- APGD


def checkpoints(n):
    """Iterations done at each check."""
    k, done, checks = max(int(0.22 * n), 1), 0, {}
    while True:
        done += k
        if done > n:
            return checks
        checks[done] = k
        k = max(k - max(int(0.03 * n), 1), max(int(0.06 * n), 1))


def auto_pgd(look, x, x0, n, epsilon, norm, rho, first=0.0):
    """C.6 for one example, flat. The state after each iteration, and what happened."""
    f, g, y = look(x0)
    right = look(x)[2]
    x_best, g_best, f_best = x0, g, f
    x_fooled = None if y == right else x0
    now, before, eta, checks = x0, x0, 2 * epsilon, checkpoints(n)
    series, since, reduced, f_checked = [first], 0, True, f
    states, events, sure = [], [], True
    for i in range(n):
        a = 1.0 if i == 0 else 0.75
        v = project(now + eta * direction(g, norm), x, epsilon, norm)
        new = project(now + a * (v - now) + (1 - a) * (now - before), x, epsilon, norm)
        before, now = now, new
        f, g, predicted = look(now)
        series.append(f)
        # Comparisons that rounding decides end the comparison with other programs.
        sure = sure and abs(f - series[-2]) > 1e-10 and abs(f - f_best) > 1e-10
        if predicted != right:
            x_fooled = now
        if f > f_best:
            x_best, g_best, f_best = now, g, f
        if i + 1 in checks:
            k = checks[i + 1]
            assert k == i + 1 - since
            rises = sum(series[j] > series[j - 1] for j in range(since + 1, i + 2))
            c1, c2 = rises <= rho * k, not reduced and f_checked >= f_best
            if c1 or c2:
                eta, now, g = eta / 2, x_best, g_best
            reduced, f_checked, since = c1 or c2, f_best, i + 1
            events.append((c1, c2))
        states.append(dict(x=now, best=x_best, fooling=x_fooled, value=f_best, size=eta, sure=sure))
    return states, events


def sphere_noise(problem, norm, rng):
    """Noise, the sampler that gives it, and the paper's start."""
    shape, flat = (problem.n, *SHAPE), problem.x.reshape(problem.n, D)
    if norm == "linf":
        drawn = rng.uniform(size=shape)
        u = (2 * drawn - 1).reshape(problem.n, D)
        sampler, length = Given([drawn]), np.abs(u).max(-1)
    else:
        drawn = rng.normal(size=shape)
        u = drawn.reshape(problem.n, D)
        sampler, length = Given(normals=[drawn]), np.sqrt((u**2).sum(-1))
    return sampler, lambda epsilon: np.clip(flat + epsilon * u / length[:, None], 0, 1)


def test_the_papers_checkpoints():
    table = {
        100: [22, 41, 57, 70, 80, 87, 93, 99],
        50: [11, 21, 30, 38, 45],
        20: [4, 7, *range(9, 21)],
        10: range(2, 11),
        1: [1],
    }
    for n, want in table.items():
        assert np.cumsum(windows(n)).tolist() == list(want) == list(checkpoints(n)), n
    for n in range(1, 200):
        limits = APGD(0.1, steps=n)._limits()
        want = {done - 1: int(0.75 * k) for done, k in checkpoints(n).items()}
        assert {i: v for i, v in enumerate(limits.tolist()) if v >= 0} == want


@pytest.mark.parametrize(
    "norm, name, epsilon, n, rho, start",
    [
        ("linf", "cross_entropy", 0.3, 40, 0.75, None),
        ("linf", "margin", 0.3, 20, 0.75, "uniform"),
        ("linf", "cross_entropy", 0.3, 40, 0.3, "none"),
        ("l2", "cross_entropy", 0.5, 40, 0.75, None),
        ("l2", "margin", 0.5, 20, 0.75, "uniform"),
        ("l2", "cross_entropy", 0.5, 40, 0.3, "none"),
    ],
)
def test_apgd_every_step(float64, norm, name, epsilon, n, rho, start):
    problem = Wavy(frequency=4.0 if norm == "linf" else 2.0)
    x = problem.x.reshape(problem.n, D)
    sampler, begin = sphere_noise(problem, norm, np.random.default_rng(3))
    x0 = x if start == "none" else begin(epsilon)
    runs = [
        auto_pgd(lambda v, i=i: problem.look(name, i, v), x[i], x0[i], n, epsilon, norm, rho)
        for i in range(problem.n)
    ]
    attack = APGD(epsilon, norm, steps=n, start=start, rho=rho)
    objective, images = problem.objective(name), ref.tensor(problem.x)
    state = attack.begin(objective, images, attack.draw(images, sampler))
    np.testing.assert_allclose(ref.numpy(state.x).reshape(-1, D), x0, atol=1e-12)
    compared = 0
    for t in range(n):
        state = attack.step(objective, images, state)
        sure = np.array([states[t]["sure"] for states, _ in runs])
        compared += sure.mean() / n

        def want(key, t=t, sure=sure):
            return np.array([s[t][key] for (s, _), keep in zip(runs, sure, strict=True) if keep])

        for key in ("x", "best", "size"):
            got = ref.numpy(getattr(state, key))[sure].reshape(want(key).shape)
            np.testing.assert_allclose(got, want(key), atol=1e-6, err_msg=f"{key} after {t + 1}")
        np.testing.assert_allclose(ref.numpy(state.best_value)[sure], want("value"), rtol=1e-6)
        fooled = np.array([states[t]["fooling"] is not None for states, _ in runs])
        assert ref.numpy(state.fooled)[sure].tolist() == fooled[sure].tolist()
        fooling = [s[t]["fooling"] for (s, _), keep in zip(runs, sure, strict=True) if keep]
        returned = [best if z is None else z for best, z in zip(want("best"), fooling, strict=True)]
        got = ref.numpy(attack.result(state))[sure].reshape(-1, D)
        np.testing.assert_allclose(got, returned, atol=1e-6)
    # Every rule has been at work.
    events = {event for _, events in runs for event in events}
    assert compared > 0.8
    assert {(False, False), (False, True) if rho == 0.3 else (True, False)} <= events
    assert any(fooled) and not all(fooled)


@pytest.mark.parametrize("norm, epsilon", [("linf", 0.3), ("l2", 0.5)])
def test_apgd_called_returns_the_highest_of_all_iterates(float64, norm, epsilon):
    problem, n = Wavy(), 12
    x = problem.x.reshape(problem.n, D)
    sampler, begin = sphere_noise(problem, norm, np.random.default_rng(4))
    x0, name = begin(epsilon), "cross_entropy"
    best, fooled = [], []
    for i in range(problem.n):
        states, _ = auto_pgd(
            lambda v, i=i: problem.look(name, i, v), x[i], x0[i], n, epsilon, norm, 0.75
        )
        best.append(states[-1]["best"])
        last = states[-1]["fooling"]
        fooled.append(best[-1] if last is None else last)
    assert np.abs(np.subtract(best, fooled)).max() > 0.01
    for keep, want in [(None, best), ("best_loss", best), ("fooled", fooled)]:
        attack = APGD(epsilon, norm, steps=n, keep=keep)
        got = run(attack, problem, sampler) if keep is None else _unrolled(attack, problem, sampler)
        np.testing.assert_allclose(got.reshape(-1, D), want, atol=1e-6)


def _unrolled(attack, problem, sampler=None, name="cross_entropy"):
    """As evaluation runs it."""
    objective, x = problem.objective(name), ref.tensor(problem.x)
    state = attack.begin(objective, x, attack.draw(x, sampler))
    for _ in range(attack.steps):
        state = attack.step(objective, x, state)
    return ref.numpy(attack.result(state))


def test_fooling_iterates_come_first_where_asked():
    image = [np.full((3, *SHAPE), v) for v in (0.1, 0.2, 0.3)]
    empty = dict.fromkeys(State._fields)
    best, fooling, x = map(ref.tensor, image)
    fooled = ops.convert_to_tensor(np.array([True, False, True]))
    state = State(**{**empty, "best": best, "fooling": fooling, "fooled": fooled, "x": x})
    want = {None: [0.2, 0.1, 0.2], "fooled": [0.2, 0.1, 0.2], "best_loss": [0.1] * 3}
    for keep, values in want.items():
        got = ref.numpy(APGD(0.1, keep=keep).result(state))
        np.testing.assert_array_equal(got, np.reshape(values, (3, 1, 1, 1)) + np.zeros(SHAPE))


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_an_equal_loss_is_no_improvement(float64, norm):
    """A flat objective with a gradient: the image moves, the best stays where it started."""

    class Flat(Linear):
        def objective(self, name, dtype="float64"):
            inner = super().objective(name, dtype)

            def logits(x):
                z = inner.logits(x)
                return ref.tensor(self.logits(self.x), dtype) + (z - ops.stop_gradient(z))

            return Objective(logits, name, ref.tensor(self.x, dtype), inner.y)

    problem, attack = Flat(n=12), APGD(0.2, norm, steps=9, start="none")
    objective, x = problem.objective("cross_entropy"), ref.tensor(problem.x)
    state = attack.begin(objective, x, ())
    moved = 0.0
    for _ in range(9):
        state = attack.step(objective, x, state)
        np.testing.assert_array_equal(ref.numpy(state.best), problem.x)
        moved = max(moved, np.abs(ref.numpy(state.fooling) - problem.x)[6:].max())
    assert moved > 0.05
    # One check per iteration, and none finds a rise but the first one's comparison with 0.
    sizes = ref.numpy(state.size)
    np.testing.assert_allclose(sizes, 0.4 / 2 ** (8 if len(windows(9)) == 9 else 9))


@pytest.mark.parametrize("name, rises", [("cross_entropy", 1), ("margin", 0)])
def test_the_first_iteration_is_compared_with_zero(float64, name, rises):
    """Whichever way the objective went from the start."""
    problem = Wavy()
    attack, x = APGD(0.3, steps=20), ref.tensor(problem.x)
    sampler, _ = sphere_noise(problem, "linf", np.random.default_rng(3))
    objective = problem.objective(name)
    state = attack.begin(objective, x, attack.draw(x, sampler))
    before = ref.numpy(state.best_value)
    state = attack.step(objective, x, state)
    after = ref.numpy(state.value)
    assert (after > before).any() and (after < before).any()
    assert ref.numpy(state.rises).tolist() == [rises] * problem.n


def test_apgd_l2_step_keeps_its_length_where_the_gradient_is_tiny(float64):
    problem = Linear(n=12)
    problem.w, problem.b = 0.2 * problem.w, np.array([26.0, 0.0, 0.0, 0.0])
    problem.x[:], problem.y[:] = 0.5, 0
    g = problem.gradient("cross_entropy", problem.x)
    assert 1e-11 < norms(g, "l2").min() <= norms(g, "l2").max() < 5e-11
    attack, x = APGD(0.1, "l2", start="none"), ref.tensor(problem.x)
    objective = problem.objective()
    state = attack.step(objective, x, attack.begin(objective, x, ()))
    length = norms(ref.numpy(state.best) - problem.x, "l2")
    np.testing.assert_allclose(length, 0.1, rtol=1e-6)


def test_apgd_gaussian_start_is_projected(float64):
    """It may be what is returned."""
    problem = Linear()
    problem.x[:, 0], problem.x[:, 1] = 0.0, 1.0
    noise = np.random.default_rng(1).normal(size=problem.x.shape)
    attack, x = APGD(0.0005, start="gaussian"), ref.tensor(problem.x)
    state = attack.begin(problem.objective(), x, attack.draw(x, Given(normals=[noise])))
    want = np.clip(problem.x + np.clip(0.001 * noise, -0.0005, 0.0005), 0, 1)
    np.testing.assert_allclose(ref.numpy(state.best), want, atol=1e-9)


# ---------------------------------------------------------------- line search


def line_search(look, x, v, epsilon, norm, a0, rho, c, trials):
    """One step of one example: the point, the size accepted and the trial it was, or ``last``."""
    f, g, _ = look(v)
    p = np.sign(g) if norm == "linf" else g / (np.sqrt((g**2).sum()) + 1e-10)
    for j in range(trials):
        a = a0 * rho**j
        z = project(v + a * p, x, epsilon, norm)
        if look(z)[0] >= f + c * (g @ (z - v)):
            return z, a, j
    return z, a, "last"


SEARCHES = {
    "default": {},
    "demanding": dict(sufficient=0.9),
    "few": dict(trials=2, sufficient=0.5),
    "one": dict(trials=1),
    "fine": dict(shrink=0.8, initial_step=0.3, trials=9),
    "warm": dict(warm=True, initial_step=0.02, sufficient=0.1),
    "warm-capped": dict(warm=True),
}


@pytest.mark.parametrize("norm, epsilon", [("linf", 0.3), ("l2", 0.5)])
@pytest.mark.parametrize("case", SEARCHES)
def test_line_search_every_step(float64, case, norm, epsilon):
    options, problem, name = SEARCHES[case], Wavy(), "cross_entropy"
    attack = LineSearch(epsilon, norm, steps=6, start="none", **options)
    a0 = options.get("initial_step", 2 * epsilon)
    rho, c = options.get("shrink", 0.5), options.get("sufficient", 1e-4)
    trials, warm = options.get("trials", 6), options.get("warm", False)
    x = v = problem.x.reshape(problem.n, D)
    begin = np.full(problem.n, a0)
    objective, images = problem.objective(name), ref.tensor(problem.x)
    state = attack.begin(objective, images, ())
    seen = set()
    for _ in range(6):
        state = attack.step(objective, images, state)
        found = [
            line_search(
                lambda u, i=i: problem.look(name, i, u),
                *(x[i], v[i], epsilon, norm, begin[i], rho, c, trials),
            )
            for i in range(problem.n)
        ]
        v = np.array([z for z, _, _ in found])
        seen |= {j for _, _, j in found}
        np.testing.assert_allclose(ref.numpy(state[0]).reshape(-1, D), v, atol=1e-6)
        if warm:
            begin = np.array([min(a / rho, max(a0, 2 * epsilon)) for _, a, _ in found])
            np.testing.assert_allclose(ref.numpy(state[1]), begin, rtol=1e-6)
    want = {
        "default": {0, 2, 3, 4},
        "demanding": {3, 4, 5, "last"},
        "few": {0, "last"},
        "one": {0, "last"},
        "fine": {0, 1, 2, 3},
        "warm": {0, 1},
        "warm-capped": {0, 1, 2},
    }[case]
    assert want <= seen, seen


def test_line_search_loss_rises_at_accepted_steps(float64):
    """With Armijo's test and enough trials no step lowers the objective."""
    problem = Wavy()
    attack = LineSearch(0.3, steps=5, start="none", trials=30)
    objective, x = problem.objective(), ref.tensor(problem.x)
    state, path = attack.begin(objective, x, ()), []
    path.append(ref.numpy(objective.value(state[0])))
    for _ in range(5):
        state = attack.step(objective, x, state)
        path.append(ref.numpy(objective.value(state[0])))
    assert (np.diff(path, axis=0) >= -1e-12).all() and (path[-1] > path[0]).all()
    assert (path[-1] - path[0]).mean() > 1


# ---------------------------------------------------------------- the ODI start


@pytest.mark.parametrize("norm, epsilon", [("linf", 0.3), ("l2", 0.5)])
@pytest.mark.parametrize("attack", [PGD, APGD, LineSearch])
def test_odi_start(float64, attack, norm, epsilon):
    """From the ball, two projected steps of length epsilon along each example's own w."""
    problem, rng = Wavy(frequency=0.3), np.random.default_rng(5)
    n, k, x = problem.n, problem.k, problem.x.reshape(problem.n, D)
    noise, weights = rng.uniform(size=(n, *SHAPE)), rng.uniform(size=(n, k))
    if norm == "linf":
        sampler = Given([noise, weights])
        v = np.clip(x + epsilon * (2 * noise.reshape(n, D) - 1), 0, 1)
    else:
        normal, radius = rng.normal(size=(n, *SHAPE)), rng.uniform(size=n)
        sampler, flat = Given([radius, weights], [normal]), normal.reshape(n, D)
        unit = flat / np.sqrt((flat**2).sum(-1))[:, None]
        v = np.clip(x + epsilon * radius[:, None] * unit, 0, 1)
    w = 2 * weights - 1

    def score(i, u):
        return w[i] @ (np.sin(u @ problem.a + problem.bias) @ problem.b)

    first = [score(i, v[i]) for i in range(n)]
    v = v.copy()
    for i in range(n):
        for _ in range(2):
            g = problem.a @ (np.cos(v[i] @ problem.a + problem.bias) * (problem.b @ w[i]))
            v[i] = project(v[i] + epsilon * direction(g, norm), x[i], epsilon, norm)
    made = attack(epsilon, norm, start="odi")
    objective, images = problem.objective(), ref.tensor(problem.x)
    drawn = made.draw(images, sampler, classes=k)
    got = ref.numpy(made.begin(objective, images, drawn)[0]).reshape(n, D)
    np.testing.assert_allclose(got, v, atol=1e-6)
    assert got.min() >= 0 and got.max() <= 1
    assert (norms(got - x, norm) <= epsilon + 1e-9).all()
    assert all(score(i, got[i]) > first[i] + 0.01 for i in range(n))


def test_odi_start_asks_for_the_number_of_classes():
    images = ref.tensor(Linear(n=2).x, "float32")
    with pytest.raises(ke.UserError, match="Received: classes=None"):
        PGD(0.1, start="odi").draw(images, Random("float32"))


@pytest.mark.parametrize("norm, epsilon", [("linf", 0.3), ("l2", 0.2)])
def test_odi_start_reaches_the_best_of_a_linear_model(norm, epsilon):
    """The weights are drawn from [-1, 1], one row per example."""
    problem = Linear(n=12, low=0.4, high=0.6)
    x = ref.tensor(problem.x, "float32")
    attack, objective = PGD(epsilon, norm, start="odi"), problem.objective(dtype="float32")
    drawn = attack.draw(x, Random("float32"), classes=4)
    w = ref.numpy(drawn[-1]).astype("float64")
    assert w.shape == (12, 4) and w.min() < -0.8 and w.max() > 0.8 and np.abs(w).max() <= 1
    assert len(np.unique(w, axis=0)) == 12
    got = ref.numpy(attack.begin(objective, x, drawn)[0])
    uniform = PGD(epsilon, norm, start="uniform").begin(objective, x, drawn)[0]
    g = w @ problem.w.T
    step = epsilon * (np.sign(g) if norm == "linf" else g / norms(g, "l2")[:, None])
    best = np.clip(problem.x.reshape(-1, D) + step, 0, 1)
    if norm == "linf":  # two steps of epsilon reach the corner from everywhere, one does not
        np.testing.assert_allclose(got.reshape(-1, D), best, atol=1e-6)

    def score(images):
        return (w * problem_logits(problem, images)).sum(-1)

    gained, most = score(got) - score(ref.numpy(uniform)), score(best) - score(ref.numpy(uniform))
    assert (gained > 0.85 * most).all() and (gained > 0).all()


def problem_logits(problem, x):
    return x.reshape(len(x), -1) @ problem.w + problem.b


# ---------------------------------------------------------------- both attacks

BOTH = {
    "apgd": lambda *a, **o: APGD(*a, **{"steps": 12, **o}),
    "line-search": lambda *a, **o: LineSearch(*a, **{"steps": 12, **o}),
    "warm": lambda *a, **o: LineSearch(*a, **{"steps": 12, "warm": True, **o}),
}


@pytest.mark.parametrize("norm, epsilon", [("linf", 0.3), ("l2", 0.5)])
@pytest.mark.parametrize("which", BOTH)
def test_batch_mates_do_not_matter(float64, which, norm, epsilon):
    problem, attack = Wavy(), BOTH[which](epsilon, norm, steps=6, start="none")
    together = run(attack, problem)
    # Batches of the same size, which JAX need not compile again.
    for rows in ([5] * 12, [2, 9, 4] * 4):
        np.testing.assert_allclose(run(attack, problem.rows(rows)), together[rows], atol=1e-9)


@pytest.mark.parametrize("which", BOTH)
def test_linf_worst_case_of_two_classes(which):
    problem = Linear(k=2, n=12)
    sign = np.sign(problem.w.T[problem.y] - problem.w.T[1 - problem.y]).reshape(problem.x.shape)
    for epsilon in (8 / 255, 0.3):
        best = np.clip(problem.x - epsilon * sign, 0, 1)
        x_adv = run(BOTH[which](epsilon, steps=10), problem)
        np.testing.assert_allclose(x_adv, best, atol=1e-6)


@pytest.mark.parametrize("which", BOTH)
def test_l2_worst_case_of_two_classes(which):
    problem, epsilon = Linear(k=2, n=12, low=0.4, high=0.6), 0.2
    w = problem.w.T[problem.y] - problem.w.T[1 - problem.y]
    best = problem.x - epsilon * (w / norms(w, "l2")[:, None]).reshape(problem.x.shape)
    assert best.min() > 0 and best.max() < 1  # the box is not active
    x_adv = run(BOTH[which](epsilon, "l2", steps=40), problem)
    np.testing.assert_allclose(x_adv, best, atol=1e-4)
    np.testing.assert_allclose(
        ref.cross_entropy(problem.y, problem.logits(x_adv)),
        ref.cross_entropy(problem.y, problem.logits(best)),
        rtol=1e-7,
    )


@pytest.mark.parametrize("start", [None, "gaussian", "none", "odi"])
@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("which", ["apgd", "line-search"])
def test_results_are_feasible(which, norm, start):
    """Restarts, pixels at 0 and 1, and examples without a gradient included."""
    problem = Linear(n=12, gate=np.repeat([1.0, 0.0], [8, 4]))
    problem.x = np.round(problem.x * 4) / 4
    problem.x[:, 0, 0], problem.x[:, 1, 1] = 0.0, 1.0
    objective, x = problem.objective(dtype="float32"), ref.tensor(problem.x, "float32")
    for epsilon in (0.0, 8 / 255, 5.0):
        attack = BOTH[which](epsilon, norm, steps=3, start=start, restarts=2)
        x_adv = ref.numpy(attack(objective, x, Random("float32"), 4)).astype("float64")
        assert np.isfinite(x_adv).all() and x_adv.min() >= 0 and x_adv.max() <= 1
        size = norms(x_adv - problem.x, norm)
        assert (size <= epsilon + 1e-6).all()
        assert np.array_equal(x_adv, problem.x) if epsilon == 0 else (size[:8] > 0.01).all()


@pytest.mark.parametrize("which", ["apgd", "warm"])
def test_a_long_compiled_run_is_the_same_as_its_steps(float64, which):
    """Past the length up to which loops are unrolled, in float32 and with any batch size."""
    problem = Wavy(frequency=0.5)
    attack = BOTH[which](0.3, steps=66, start="none")

    def whole(x):
        objective = problem.objective(dtype="float32")
        return (attack(objective, x, None),)

    if BACKEND == "tensorflow":
        import tensorflow as tf

        spec = tf.TensorSpec((None, *SHAPE), "float32")
        whole = tf.function(whole, input_signature=[spec], autograph=False)
    else:
        whole = backend.compiled(whole, [])
    got = ref.numpy(whole(ref.tensor(problem.x, "float32"))[0])
    assert got.dtype == np.float32
    keep = {"keep": "best_loss"} if which == "apgd" else {}
    want = _unrolled(BOTH[which](0.3, steps=66, start="none", **keep), problem)
    loss = [[problem.look("cross_entropy", i, v.ravel())[0] for i, v in enumerate(images)]
            for images in (got.astype("float64"), want)]  # fmt: skip
    np.testing.assert_allclose(*loss, rtol=1e-3)


@pytest.mark.skipif(BACKEND != "torch", reason="torch only")
@pytest.mark.parametrize("which", BOTH)
def test_torch_reads_nothing_back_between_steps(which):
    from torch.utils._python_dispatch import TorchDispatchMode

    class Names(TorchDispatchMode):
        seen = []

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.seen.append(str(function))
            return function(*args, **(kwargs or {}))

    problem, attack = Wavy(), BOTH[which](0.3, start="none")
    objective, x = problem.objective(dtype="float32"), ref.tensor(problem.x, "float32")
    state = attack.begin(objective, x, ())
    with Names() as names:
        state = attack.step(objective, x, state)
    assert any("sin" in name for name in names.seen)
    assert not [name for name in names.seen if "_local_scalar_dense" in name]


# ---------------------------------------------------------------- in use

X, Y = images(32)


@pytest.mark.parametrize("which", ["apgd", "line-search"])
def test_training_and_evaluation(which):
    keras.utils.set_random_seed(0)
    layers = [keras.Input(X.shape[1:]), keras.layers.Flatten(), keras.layers.Dense(3)]
    model = keras.Sequential(layers)
    attack = BOTH[which](0.1, steps=2)
    classifier = ke.RobustClassifier(model, attack=attack)
    classifier.compile(optimizer=keras.optimizers.Adam(1e-2))
    before = snapshot(model.variables)
    history = classifier.fit(X, Y, batch_size=16, epochs=1, verbose=0).history
    assert np.isfinite(history["loss"]).all()
    with pytest.raises(AssertionError):
        assert_same(before, snapshot(model.variables))
    labels = ops.convert_to_numpy(model(X)).argmax(1)
    labels[:3] = (labels[:3] + 1) % 3
    result = ke.evaluate_attack(model, attack, X, labels, batch_size=16)
    np.testing.assert_array_equal(result.correct, np.arange(32) >= 3)
    predicted = ops.convert_to_numpy(model(result.x_adv)).argmax(1)
    np.testing.assert_array_equal(result.robust, result.correct & (predicted == labels))
    assert 0 < result.max_perturbation <= 0.1 + 1e-6
    assert result.robust.sum() < 29
    card = describe_attack(attack)
    assert (card["name"], card["step_size"]) == (attack.name, 0.2)
    assert classifier.eval_attack.name == "pgd"


@pytest.mark.parametrize(
    "make, field",
    [
        (lambda: APGD(0.1, rho=1.5), "rho"),
        (lambda: APGD(0.1, rho=-0.1), "rho"),
        (lambda: APGD(0.1, keep="last"), "keep"),
        (lambda: APGD(0.1, steps=0), "steps"),
        (lambda: APGD(0.1, norm="l1"), "norm"),
        (lambda: APGD(-0.1), "epsilon"),
        (lambda: APGD(0.1, start="corner"), "start"),
        (lambda: LineSearch(0.1, shrink=1.0), "shrink"),
        (lambda: LineSearch(0.1, shrink=0), "shrink"),
        (lambda: LineSearch(0.1, sufficient=1.1), "sufficient"),
        (lambda: LineSearch(0.1, sufficient="much"), "sufficient"),
        (lambda: LineSearch(0.1, initial_step=-1), "initial_step"),
        (lambda: LineSearch(0.1, trials=0), "trials"),
        (lambda: LineSearch(0.1, warm="yes"), "warm"),
    ],
)
def test_bad_options_are_refused_in_one_line(make, field):
    with pytest.raises(ke.UserError) as caught:
        make()
    assert field in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "attack",
    [
        APGD(0.2, "l2", 7, "odi", 2, "margin", rho=0.5, keep="fooled", eot=2),
        LineSearch(0.2, "l2", 7, "none", 2, "kl", 0.3, 0.7, 0.01, 4, True),
        APGD(0.1),
        LineSearch(0.1),
    ],
)
def test_options_survive_saving(attack):
    again = type(attack).from_config(attack.get_config())
    assert again.get_config() == attack.get_config()
    loaded = keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(attack))
    assert type(loaded) is type(attack) and repr(loaded) == repr(attack)
    assert ATTACKS.get(attack.name) is type(attack)
    if attack.epsilon == 0.2:
        plain = type(attack)(0.1).get_config()
        assert all(plain[key] != value for key, value in attack.get_config().items())
