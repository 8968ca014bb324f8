"""DeepFool, Carlini-Wagner, FAB and FAB-T: closed forms, and NumPy loops, example by example."""

import functools

import keras
import numpy as np
import pytest
from scipy import optimize

import keras_emr as ke
from keras_emr import backend
from keras_emr.attacks import ATTACKS
from keras_emr.attacks.carlini_wagner import CarliniWagner
from keras_emr.attacks.deepfool import DeepFool
from keras_emr.attacks.fab import FAB, FABTargeted
from keras_emr.attacks.hyperplane import displacement
from keras_emr.evaluation.attack_run import AttackRun
from tests.builders import images
from tests.golden import reference as ref
from tests.golden.test_attacks import SHAPE, D, Given, Linear, norms
from tests.golden.test_search_attacks import BACKEND, Wavy

NORMS = ("linf", "l2")
DUAL = {"linf": "l1", "l2": "l2"}


def length(v, norm):
    return ref.vector_norm(v[None], norm)[0]


@functools.lru_cache(maxsize=2)
def compiled(attack, problem, dtype):
    """``begin`` and ``step``, as evaluation runs them."""
    objective = problem.objective(dtype=dtype)
    begin = backend.compiled(lambda x, drawn: attack.begin(objective, x, drawn), [])
    return begin, backend.compiled(lambda x, state: attack.step(objective, x, state), [])


def states(attack, problem, drawn=(), dtype="float64"):
    """The attack's states."""
    (begin, step), x = compiled(attack, problem, dtype), ref.tensor(problem.x, dtype)
    state = begin(x, drawn)
    yield state
    for _ in range(attack.steps):
        state = step(x, state)
        yield state


def found(attack, problem, drawn=(), dtype="float64"):
    """What it returns, (N, D)."""
    *_, state = states(attack, problem, drawn, dtype)
    assert keras.backend.standardize_dtype(attack.result(state).dtype) == dtype
    return ref.numpy(attack.result(state)).astype("float64").reshape(-1, D)


def plain_draw(attack, problem, run=0, classes=4, dtype="float64", sampler=None):
    sampler = sampler or Given()
    sampler.restart = run
    return attack.draw(ref.tensor(problem.x, dtype), sampler, classes)


# ---------------------------------------------------------------- the projection


def reach(t, w, amount, norm):
    """The box-constrained move that ``amount`` allows, from the formulas of the paper."""
    if norm == "linf":
        d = np.where(w < 0, np.minimum(amount, 1 - t), np.maximum(-amount, -t))
        return np.where(w == 0, 0.0, d)
    return np.where(np.abs(w) < 1e-8, 0.0, np.clip(t - amount * w, 0, 1) - t)


def shortest(t, w, gap, norm):
    """By bisection, one point at a time."""
    if gap < 0:
        w, gap = -w, -gap
    low, high = 0.0, 1.0
    while w @ reach(t, w, high, norm) > -gap:
        high *= 2
        if high > 1e12:
            return reach(t, w, np.inf if norm == "linf" else 1e30, norm)
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (low, middle) if w @ reach(t, w, middle, norm) <= -gap else (middle, high)
    return reach(t, w, high, norm)


def cases(n=48, seed=0):
    """Points, normals, gaps and the most that can be gained: two thirds of them feasible."""
    rng = np.random.default_rng(seed)
    t, w = rng.uniform(size=(n, D)), rng.normal(size=(n, D)) * 10.0 ** rng.uniform(-3, 3, (n, 1))
    t[::4, :3], t[1::4, 2:5] = 0.0, 1.0
    w[::3, 1:4], w[2::5] = 0.0, w[2::5] * 10.0 ** rng.uniform(-3, 0, (len(w[2::5]), D))
    sign = rng.choice([-1.0, 1.0], n)
    corner = np.where(w * sign[:, None] > 0, 0.0, np.where(w == 0, t, 1.0))
    most = np.abs((w * (corner - t)).sum(-1))
    gap = sign * most * np.where(np.arange(n) % 3 == 1, 1.5, rng.uniform(0, 1, n) ** 0.5)
    gap[0] = 0.0
    return t, w, gap, most, corner


def project(t, w, gap, norm, dtype="float64"):
    shape = (-1, *SHAPE) if t.shape[-1] == D else (*t.shape, 1, 1)
    t, w = (ref.tensor(v.reshape(shape), dtype) for v in (t, w))
    move = backend.compiled(lambda t, w, gap: displacement(t, w, gap, norm), [])
    d = move(t, w, ref.tensor(gap, dtype))
    assert keras.backend.standardize_dtype(d.dtype) == dtype
    return ref.numpy(d).astype("float64").reshape(len(gap), -1)


@pytest.mark.parametrize("norm", NORMS)
def test_displacement(norm):
    t, w, gap, most, corner = cases()
    got = project(t, w, gap, norm)
    feasible = np.abs(gap) < most
    assert feasible.sum() == 32
    scale = np.abs(w).max(-1)
    np.testing.assert_allclose(
        ((w * got).sum(-1) / scale)[feasible], (-gap / scale)[feasible], atol=1e-9
    )
    np.testing.assert_allclose((t + got)[~feasible], corner[~feasible], atol=1e-12)
    assert (t + got).min() > -1e-12 and (t + got).max() < 1 + 1e-12
    assert np.array_equal(got[0], np.zeros(D)) and not got[w == 0].any()
    want = [shortest(*row, norm) for row in zip(t, w, gap, strict=True)]
    np.testing.assert_allclose(got, want, atol=1e-8)


@pytest.mark.parametrize("norm", NORMS)
def test_no_point_of_the_hyperplane_in_the_box_is_nearer(norm):
    """Against a linear program (Linf) and sequential quadratic programming (L2)."""
    t, w, gap, most, _ = cases(24, seed=1)
    w = w / np.abs(w).max(-1, keepdims=True)
    gap = np.where(np.abs(gap) < most, gap, 0) / np.abs(cases(24, seed=1)[1]).max(-1)
    got = project(t, w, gap, norm)
    for i in np.flatnonzero(gap):
        bounds = np.stack([-t[i], 1 - t[i]], -1)
        if norm == "linf":  # of (d, s): minimise s with |d| <= s
            below = np.concatenate([np.eye(D), -np.eye(D)])
            best = optimize.linprog(
                np.eye(D + 1)[D],
                A_ub=np.concatenate([below, -np.ones((2 * D, 1))], -1),
                b_ub=np.zeros(2 * D),
                A_eq=np.append(w[i], 0.0)[None],
                b_eq=[-gap[i]],
                bounds=[*bounds, (0, None)],
            ).fun
        else:
            solved = optimize.minimize(
                lambda d: d @ d,
                np.zeros(D),
                jac=lambda d: 2 * d,
                bounds=bounds,
                constraints=dict(type="eq", fun=lambda d, i=i: w[i] @ d + gap[i]),
                options=dict(maxiter=500, ftol=1e-14),
            )
            best = np.sqrt(solved.fun)
        assert length(got[i], norm) == pytest.approx(best, rel=1e-5, abs=1e-7)


@pytest.mark.parametrize("norm", NORMS)
def test_displacement_of_large_images_in_float32(norm):
    """Weights over many orders of magnitude; nearly all the room, too little, and none."""
    rng = np.random.default_rng(0)
    t = rng.uniform(size=(8, 3072))
    w = (rng.normal(size=t.shape) * 10.0 ** rng.uniform(-4, 0, t.shape)).astype("float32")
    w[6] *= 10.0 ** rng.uniform(-6, 0, 3072)
    w[7] = 0.0
    most = (np.abs(w) * np.where(w < 0, 1 - t, t)).sum(-1)
    gap = most * [0.0, 0.01, 0.3, 0.6, 0.9, 0.99, 1.0001, 0.0]
    gap[7] = 1.0
    got = project(t, w, gap, norm, "float32")
    gained = -(w * got).sum(-1)
    np.testing.assert_allclose(gained[:6], gap[:6], atol=3e-6 * most.max())
    stays = (norm == "l2") & (np.abs(w[6]) < 1e-8)
    corner = np.where(stays, t[6], w[6] < 0)
    np.testing.assert_allclose(t[6] + got[6], corner, atol=1e-6)
    assert not got[7].any()
    want = length(shortest(t[3], w[3].astype(float), gap[3], norm), norm)
    assert length(got[3], norm) == pytest.approx(want, rel=1e-4)


def test_a_hyperplane_just_outside_the_box_leads_to_the_corner():
    """Walls and weights for which Newton's iteration passes one wall at a time."""
    j = np.arange(40.0)
    t, w = 4.0 ** (j - 39), 8.0**-j
    got = project(t[None], w[None], np.array([(t * w).sum() * (1 + 1e-12)]), "linf")
    np.testing.assert_allclose(got[0], -t, rtol=1e-12)


# ---------------------------------------------------------------- linear models


def linear(n=12, **options):
    """All right, the walls of the box far away; and the distances to the nearest boundary."""
    problem = Linear(n=n, low=0.3, high=0.7, **options)
    problem.b = -problem.w.sum(0) / 2  # all classes tie at grey
    problem.y = problem.logits(problem.x).argmax(-1)
    z, distances = problem.logits(problem.x), {}
    for norm in NORMS:
        each = np.full((n, problem.k), np.inf)
        for i, k in np.ndindex(n, problem.k):
            if k != problem.y[i]:
                w = problem.w[:, k] - problem.w[:, problem.y[i]]
                each[i, k] = (z[i, problem.y[i]] - z[i, k]) / length(w, DUAL[norm])
        distances[norm] = each.min(-1)
    assert max(d.max() for d in distances.values()) < 0.4
    return problem, distances


def reached(problem, x_adv, norm):
    """Distances, where every result is misclassified and in the box."""
    assert x_adv.min() >= 0 and x_adv.max() <= 1
    assert (problem.logits(x_adv).argmax(-1) != problem.y).all()
    return norms(x_adv - problem.x.reshape(-1, D), norm)


PRECISE = [("float64", 1e-7, 0.0), ("float32", 1e-4, 0.02)]


@pytest.mark.parametrize("dtype, rtol, overshoot", PRECISE)
@pytest.mark.parametrize("norm", NORMS)
def test_deepfool_reaches_the_boundary_of_a_linear_model(norm, dtype, rtol, overshoot):
    """In one step; 1e-4 beyond it, and the overshoot on both."""
    problem, distance = linear()
    attack = DeepFool(norm=norm, overshoot=overshoot, steps=3)
    got = reached(problem, found(attack, problem, dtype=dtype), norm)
    np.testing.assert_allclose(got, (1 + overshoot) * (distance[norm] + 1e-4), rtol=rtol)


@pytest.mark.parametrize("norm", NORMS)
def test_fab_reaches_the_boundary_of_a_linear_model(norm):
    """Within the overshoot that comes back at every step, which ``eta`` makes small."""
    problem, distance = linear()
    got = reached(problem, found(FAB(norm=norm, steps=10), problem), norm)
    assert (got > distance[norm]).all() and (got < 1.0055 * distance[norm]).all()
    fine = FAB(norm=norm, steps=10, eta=1.0005)
    got = reached(problem, found(fine, problem, dtype="float32"), norm)
    np.testing.assert_allclose(got, distance[norm], rtol=1e-3)


@pytest.mark.parametrize("norm", NORMS)
def test_fab_targeted_reaches_the_boundary_in_one_of_its_runs(norm):
    problem, distance = linear()
    attack = FABTargeted(norm=norm, steps=10, eta=1.0005)
    assert attack.runs(4) == 3
    runs = [found(attack, problem, plain_draw(attack, problem, run)) for run in range(3)]
    lengths = [norms(v - problem.x.reshape(-1, D), norm) for v in runs]
    lengths = np.where(np.any(np.not_equal(runs, problem.x.reshape(-1, D)), -1), lengths, np.inf)
    np.testing.assert_allclose(np.min(lengths, 0), distance[norm], rtol=1e-3)
    assert len(set(np.argmin(lengths, 0))) > 1  # the nearest boundary is not always the runner-up's


def test_carlini_wagner_reaches_the_boundary_of_a_linear_model():
    """Of two classes: of more, the runner-up's boundary need not be the nearest.

    Where the distance is many of Adam's steps.
    """
    problem, distance = linear(k=2)
    attack = CarliniWagner(searches=3, iterations=300, initial_c=0.3, learning_rate=0.003)
    got = reached(problem, found(attack, problem, dtype="float32"), "l2")
    far = distance["l2"] > 0.05
    assert far.sum() == 8 and (got > distance["l2"]).all()
    np.testing.assert_allclose(got[far], distance["l2"][far], rtol=1e-3)


# ---------------------------------------------------------------- step by step


class Model:
    """Logits and Jacobian of a :class:`Wavy` problem, one example at a time."""

    def __init__(self, problem):
        self.p = problem

    def logits(self, i, v):
        lead = self.p.lead[i] * np.eye(self.p.k)[self.p.y[i]]
        return np.sin(v @ self.p.a + self.p.bias) @ self.p.b + lead

    def jacobian(self, v):
        return ((self.p.a * np.cos(v @ self.p.a + self.p.bias)) @ self.p.b).T


def boundary(model, i, v, norm, tiny, rivals):
    """``(f, w)`` of the nearest linearised boundary."""
    y, z, j = model.p.y[i], model.logits(i, v), model.jacobian(v)
    f, w = z - z[y], j - j[y]
    q = ref.vector_norm(w, DUAL[norm])
    best = min(rivals, key=lambda k: abs(f[k]) / (q[k] + tiny))
    return f[best], w[best]


def ranked(model, i, x):
    order = np.argsort(-model.logits(i, x))
    return [k for k in order if k != model.p.y[i]]


def deepfool(model, i, x, norm, steps, overshoot, candidates):
    """Iterates and results."""
    rivals, total, v = ranked(model, i, x)[:candidates], np.zeros(D), x
    path, best = [], x
    for _ in range(steps):
        if best is x:
            f, w = boundary(model, i, v, norm, 1e-8, rivals)
            if norm == "l2":
                size = np.sqrt((w**2).sum()) + 1e-8
                total = total + (abs(f) / size + 1e-4) * w / size
            else:
                total = total + (abs(f) / (np.abs(w).sum() + 1e-8) + 1e-4) * np.sign(w)
            v = np.clip(x + (1 + overshoot) * total, 0, 1)
            if model.logits(i, v).argmax() != model.p.y[i]:
                best = v
        path.append((v, best))
    return path


def fab(model, i, x, start, norm, steps, alpha_max, eta, beta, rivals):
    v, best, nearest, path = start, x, np.inf, []
    for _ in range(steps):
        f, w = boundary(model, i, v, norm, 1e-12, rivals)
        b = w @ v - f
        d1, d2 = (shortest(u, w, w @ u - b, norm) for u in (v, x))
        a1, a2 = (max(length(d, norm), 1e-8) for d in (d1, d2))
        alpha = min(a1 / (a1 + a2), alpha_max)
        v = np.clip((1 - alpha) * (v + eta * d1) + alpha * (x + eta * d2), 0, 1)
        if model.logits(i, v).argmax() != model.p.y[i]:
            if length(v - x, norm) < nearest:
                best, nearest = v, length(v - x, norm)
            v = x + beta * (v - x)
        path.append((v, best))
    return path


def compare(attack, problem, paths, drawn=(), atol=1e-7):
    """Every iterate and every result; some are fooled late, and some never."""
    x = problem.x.reshape(-1, D)
    followed = states(attack, problem, drawn)
    next(followed)
    for t, state in enumerate(followed):
        for got, which in ((state[0], 0), (attack.result(state), 1)):
            want = np.array([path[t][which] for path in paths])
            np.testing.assert_allclose(ref.numpy(got).reshape(-1, D), want, atol=atol)
    found = [[np.any(best != v) for _, best in path] for v, path in zip(x, paths, strict=True)]
    return np.array(found)


@pytest.mark.parametrize(
    "norm, overshoot, candidates", [("linf", 0.02, 10), ("l2", 0.02, None), ("l2", 0.2, 1)]
)
def test_deepfool_every_step(norm, overshoot, candidates):
    problem = Wavy(frequency=2.0)
    attack = DeepFool(norm=norm, steps=6, overshoot=overshoot, candidates=candidates)
    model, x = Model(problem), problem.x.reshape(-1, D)
    paths = [deepfool(model, i, x[i], norm, 6, overshoot, candidates) for i in range(problem.n)]
    fooled = compare(attack, problem, paths)
    assert fooled[:, 0].any() and not fooled[:, -1].all()
    assert (fooled[:, -1] & ~fooled[:, 0]).any()
    *_, state = states(attack, problem)
    assert ref.numpy(attack.finished(state)).tolist() == fooled[:, -1].tolist()


@pytest.mark.parametrize("norm", NORMS)
def test_fab_every_step(norm):
    problem = Wavy(frequency=2.0)
    model, x = Model(problem), problem.x.reshape(-1, D)
    paths = [
        fab(model, i, x[i], x[i], norm, 12, 0.1, 1.05, 0.9, ranked(model, i, x[i]))
        for i in range(problem.n)
    ]
    fooled = compare(FAB(norm=norm, steps=12), problem, paths)
    assert fooled[:, -1].any() and not fooled[:, -1].all()
    assert (fooled[:, -1] & ~fooled[:, 0]).any()


@pytest.mark.parametrize("norm", NORMS)
def test_fab_targeted_every_step_of_every_run(norm):
    """Two targets twice, with random starts, other constants and labels that are not arg-max."""
    problem, epsilon = Wavy(frequency=2.0), 0.4
    attack = FABTargeted(epsilon, norm, 6, 2, alpha_max=0.3, eta=1.2, beta=0.7, targets=2)
    model, x = Model(problem), problem.x.reshape(-1, D)
    noise = np.random.default_rng(4).uniform(size=problem.x.shape)
    assert attack.runs(4) == 4
    for run in range(4):
        drawn = plain_draw(attack, problem, run, sampler=Given([noise], [noise - 0.5]))
        u = noise.reshape(-1, D) * 2 - 1
        u = u / norms(u, norm)[:, None]
        start = np.clip(x + (0.5 * epsilon * u if run >= 2 else 0), 0, 1)
        paths = [
            fab(model, i, x[i], start[i], norm, 6, 0.3, 1.2, 0.7, [ranked(model, i, x[i])[run % 2]])
            for i in range(problem.n)
        ]
        fooled = compare(attack, problem, paths, drawn)
        assert fooled[:, -1].any() and not fooled[:, -1].all()


def carlini_wagner(model, i, x, searches, iterations, rate, c, kappa, events):
    """State after every iteration: the image just tried, and the result."""
    y, nearest, best, path = model.p.y[i], np.inf, x, []
    t = np.arctanh((2 * x - 1) * 0.999999)
    origin = (np.tanh(t) + 1) / 2
    lower, upper = 0.0, 1e10
    for search in range(searches):
        if searches >= 10 and search == searches - 1:
            c = upper
        w, m, v, last, active, success = np.zeros(D), np.zeros(D), np.zeros(D), np.inf, True, False
        for k in range(iterations):
            image = (np.tanh(t + w) + 1) / 2
            z = model.logits(i, image)
            rival = np.where(np.arange(len(z)) == y, -np.inf, z).argmax()
            lead = z[y] - z[rival] + kappa
            loss = ((image - origin) ** 2).sum() + c * max(0.0, lead)
            if active and z[rival] > z[y] + kappa:
                success = True
                if length(image - x, "l2") < nearest:
                    nearest, best = length(image - x, "l2"), image
            if k % max(iterations // 10, 1) == 0:
                if loss > 0.9999 * last and active:
                    active = False
                    events.add("aborted")
                last = loss
            if active:
                j = model.jacobian(image)
                g = 2 * (image - origin) + c * (lead > 0) * (j[y] - j[rival])
                g = g * 2 * image * (1 - image)
                m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
                step = rate * np.sqrt(1 - 0.999 ** (k + 1)) / (1 - 0.9 ** (k + 1))
                w = w - step * m / (np.sqrt(v) + 1e-8)
            path.append((w if k + 1 < iterations else np.zeros(D), best))
        if success:
            upper = min(upper, c)
        else:
            lower = max(lower, c)
        events.add((success, upper < 1e9))
        if upper < 1e9:
            c = (lower + upper) / 2
        elif not success:
            c *= 10
    return path


@pytest.mark.parametrize(
    "searches, iterations, options, seen",
    [
        (4, 25, dict(learning_rate=0.05, initial_c=0.05), {"aborted", (False, True)}),
        (3, 7, dict(learning_rate=0.1, initial_c=1.0, kappa=0.5), {"aborted"}),
        (10, 4, dict(learning_rate=0.2, initial_c=0.1), {"aborted", (False, True)}),
    ],
)
def test_carlini_wagner_every_step(searches, iterations, options, seen):
    problem = Wavy(frequency=2.0, lead=8.0)
    problem.x[0, 0], problem.x[1, 0] = 0.0, 1.0
    model, x, events = Model(problem), problem.x.reshape(-1, D), set()
    problem.y = np.array([Model.logits(model, i, x[i]).argmax() for i in range(problem.n)])
    attack = CarliniWagner(searches=searches, iterations=iterations, **options)
    rate, c, kappa = attack.learning_rate, attack.initial_c, attack.kappa
    paths = [
        carlini_wagner(model, i, x[i], searches, iterations, rate, c, kappa, events)
        for i in range(problem.n)
    ]
    fooled = compare(attack, problem, paths)
    assert fooled[:, -1].any() and not fooled[:, -1].all()
    assert {(True, True), (False, False), *seen} <= events


# ---------------------------------------------------------------- all of them

ALL = {
    "deepfool-linf": DeepFool(norm="linf", steps=4),
    "deepfool-l2": DeepFool(steps=4),
    "cw-l2": CarliniWagner(searches=2, iterations=20, learning_rate=0.5, initial_c=100.0),
    "fab-linf": FAB(steps=6),
    "fab-l2": FAB(norm="l2", steps=6),
    "fab-t-linf": FABTargeted(steps=6),
    "fab-t-l2": FABTargeted(norm="l2", steps=6),
}


@pytest.mark.parametrize("which", ["deepfool-linf", "deepfool-l2", "cw-l2", "fab-linf", "fab-t-l2"])
def test_results_are_feasible_with_two_classes(which):
    """Walls, images without a gradient and images that are wrong to begin with, in float32."""
    problem, attack = Linear(k=2, n=12, gate=np.repeat([1.0, 0.0], [9, 3])), ALL[which]
    problem.x = np.round(problem.x * 4) / 4
    problem.x[:, 0, 0], problem.x[:, 1, 1] = 0.0, 1.0
    problem.b = problem.b - problem.logits(problem.x).mean(0)  # near the boundary
    problem.y = problem.logits(problem.x).argmax(-1)
    problem.y[6:9] = 1 - problem.y[6:9]
    x = problem.x.reshape(-1, D)
    drawn = plain_draw(attack, problem, 0, 2, "float32")
    x_adv = found(attack, problem, drawn, "float32")
    assert np.isfinite(x_adv).all() and x_adv.min() >= 0 and x_adv.max() <= 1
    fooled = problem.logits(x_adv).argmax(-1) != problem.y
    np.testing.assert_array_equal(fooled, np.arange(12) < 9)
    np.testing.assert_array_equal(x_adv[9:], x[9:])
    assert np.abs(x_adv - x)[6:9].max() <= (1e-6 if which == "cw-l2" else 0)
    assert (norms(x_adv - x, "l2")[:6] > 0.01).all()
    assert attack.runs(2) == 1


def test_fab_restarts():
    """The first run starts at the image, as a single one does; the others where the noise says."""
    problem = Wavy(frequency=2.0)
    noise = np.random.default_rng(3).uniform(size=problem.x.shape)
    noise[5] = 0.5
    attack, sampler = FAB(0.4, steps=2, restarts=3), Given([noise])
    first, second = (plain_draw(attack, problem, run, sampler=sampler) for run in (0, 1))
    alone = found(FAB(steps=2), problem)
    np.testing.assert_array_equal(found(attack, problem, first), alone)
    assert np.abs(found(attack, problem, second) - alone).max() > 0.01
    begun = ref.numpy(next(states(attack, problem, second))[0])
    size = norms(np.where(begun % 1 > 0, begun - problem.x, 0), "linf")
    assert size[5] == 0 and (size[np.arange(12) != 5] <= 0.2 + 1e-12).all()
    assert (size > 0.199).sum() > 6
    with pytest.raises(ke.UserError, match="epsilon=None, restarts=3") as caught:
        FAB(restarts=3)
    assert "\n" not in str(caught.value)


def test_targets_share_their_compiled_step():
    """The target is a number in the state and not in the program."""
    problem, attack = Wavy(n=4), FABTargeted(0.3, steps=1, restarts=2, targets=2)
    objective, x = problem.objective(), ref.tensor(problem.x)
    noise, calls = Given([problem.x]), []

    def step(x, drawn):
        calls.append(1)
        return attack.step(objective, x, attack.begin(objective, x, drawn))

    both = backend.compiled(step, [])
    rivals = [
        ref.numpy(both(x, plain_draw(attack, problem, run, sampler=noise)).rivals)[:, 0]
        for run in range(4)
    ]
    assert len(calls) == (4 if BACKEND == "torch" else 1)
    want = [ranked(Model(problem), i, problem.x[i].ravel()) for i in range(4)]
    for run in range(4):
        assert rivals[run].tolist() == [row[run % 2] for row in want]


@pytest.mark.parametrize("which", ["deepfool-l2", "cw-l2", "fab-t-linf"])
def test_in_use(which):
    """A Keras model and a padded batch: what is misclassified has moved, and nothing else."""
    keras.utils.set_random_seed(0)
    x, _ = images(5)
    layers = [keras.Input(x.shape[1:]), keras.layers.Flatten(), keras.layers.Dense(3)]
    model, attack = keras.Sequential(layers), ALL[which]
    y = keras.ops.convert_to_numpy(model(x)).argmax(1).astype("int32")
    index, run = np.arange(5), AttackRun(model, attack, 5)
    whole, _ = run.attack_batch(x, y, index, 0, 0)
    part, _ = run.attack_batch(x[:2], y[:2], index[:2], 0, 0)
    np.testing.assert_allclose(part, whole[:2], rtol=0, atol=1e-6)
    wrong = keras.ops.convert_to_numpy(model(whole)).argmax(1) != y
    moved = np.abs(whole - x).reshape(5, -1).max(-1) > 0
    assert wrong.any() and wrong.tolist() == moved.tolist()


@pytest.mark.parametrize(
    "make, field",
    [
        (lambda: DeepFool(overshoot=-0.1), "overshoot"),
        (lambda: DeepFool(candidates=0), "candidates"),
        (lambda: DeepFool(norm="l1"), "norm"),
        (lambda: CarliniWagner(norm="linf"), "norm"),
        (lambda: CarliniWagner(searches=0), "searches"),
        (lambda: CarliniWagner(iterations=1.5), "iterations"),
        (lambda: CarliniWagner(initial_c=0), "initial_c"),
        (lambda: CarliniWagner(kappa=-1), "kappa"),
        (lambda: CarliniWagner(learning_rate=None), "learning_rate"),
        (lambda: FAB(alpha_max=1.5), "alpha_max"),
        (lambda: FAB(beta=2), "beta"),
        (lambda: FAB(eta=-1), "eta"),
        (lambda: FAB(epsilon=-1), "epsilon"),
        (lambda: FABTargeted(restarts=2), "fab-t starts"),
        (lambda: FABTargeted(targets=0), "targets"),
    ],
)
def test_bad_options_are_refused_in_one_line(make, field):
    with pytest.raises(ke.UserError) as caught:
        make()
    assert field in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "attack",
    [
        *ALL.values(),
        DeepFool(0.2, "linf", 7, 0.1, None),
        CarliniWagner(0.2, "l2", 3, 20, 0.05, 0.1, 2.0, 2),
        FAB(0.2, "l2", 7, 2, 0.2, 1.1, 0.8),
        FABTargeted(0.2, "l2", 7, 2, 0.2, 1.1, 0.8, 4),
    ],
)
def test_options_survive_saving(attack):
    loaded = keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(attack))
    assert type(loaded) is type(attack) and repr(loaded) == repr(attack)
    assert loaded.steps == attack.steps
    assert ATTACKS.get(attack.name) is type(attack)
    if isinstance(attack, CarliniWagner):
        assert attack.steps == attack.searches * attack.iterations
    if attack.epsilon == 0.2:
        plain = type(attack)().get_config()
        same = {key for key, value in attack.get_config().items() if plain[key] == value}
        assert same <= {"norm"}
