"""Attacks that see labels alone: closed-form distances, steps read off what the model was asked."""

import tracemalloc

import numpy as np
import pytest

from keras_emr.attacks import ATTACKS, decision
from keras_emr.attacks.boundary import BoundaryAttack, Window
from keras_emr.attacks.decision import Run
from keras_emr.attacks.hop_skip_jump import HopSkipJump
from keras_emr.attacks.sign_opt import SignOPT
from keras_emr.errors import UserError

SHAPE, D = (4, 4, 3), 48
QUICK = {
    "hopskipjump": {"steps": 6},
    "boundary": {"steps": 40},
    "sign-opt": {"steps": 4, "directions": 60},
}


class Plane:
    """Two classes: logits ``(0, (u - centre) a - level)``; keeps what it was asked.

    Sums are taken row by row, so that an image's score does not depend on its batch.
    """

    def __init__(self, n=4, one_hot=False, shift=0.03, level=0.0, seed=0):
        rng = np.random.default_rng(seed)
        self.a = rng.normal(size=D)
        side = shift * (-1.0) ** np.arange(n)[:, None] * np.sign(self.a)
        x = rng.uniform(0.4, 0.6, (n, D)) + side
        self.x = x.reshape(n, *SHAPE).astype("float32")
        self.level, self.one_hot = level, one_hot
        self.y = self.wrong_for(self.x, 0).astype(int)
        self.images, self.answers = [], []

    def value(self, images):
        return ((images.reshape(len(images), D).astype("float64") - 0.5) * self.a).sum(axis=1)

    def wrong_for(self, images, y):
        return (self.value(images) > self.level) != y

    def __call__(self, images):
        assert images.dtype == np.float32 and images.shape[1:] == SHAPE
        assert len(images) and images.min() >= 0 and images.max() <= 1
        value = self.value(images) - self.level
        self.images.append(images.copy())
        self.answers.append((value > 0).astype(int))
        if self.one_hot:
            return np.eye(2, dtype="float32")[self.answers[-1]]
        return np.stack([np.zeros_like(value), value], axis=1)

    @property
    def asked(self):
        return sum(map(len, self.images))

    def closed_form(self, norm):
        dual = np.abs(self.a).sum() if norm == "linf" else np.linalg.norm(self.a)
        return np.abs(self.value(self.x) - self.level) / dual

    def assert_box_is_far(self, norm):
        """The nearest image of the other class lies inside the box."""
        step = np.sign(self.a) / np.abs(self.a).sum() if norm == "linf" else self.a
        step = step / (step @ self.a)
        nearest = self.x.reshape(-1, D) - (self.value(self.x) - self.level)[:, None] * step
        assert nearest.min() > 0.1 and nearest.max() < 0.9


def streams(n, first=0):
    return [np.random.default_rng([5, first + i]) for i in range(n)]


def distance(images, x, norm="l2"):
    delta = (images.astype("float64") - x.astype("float64")).reshape(len(images), -1)
    return np.abs(delta).max(axis=1) if norm == "linf" else np.linalg.norm(delta, axis=1)


def attack_of(name, **options):
    return ATTACKS.get(name)(**(QUICK[name] | options))


# ---------------------------------------------------------------- closed forms


@pytest.mark.parametrize(
    "attack, tolerance",
    [
        (HopSkipJump(norm="l2"), 0.01),
        (HopSkipJump(norm="linf"), 0.02),
        (SignOPT(steps=60), 1e-4),
        (BoundaryAttack(steps=6000), 0.005),
    ],
    ids=lambda v: getattr(v, "name", None),
)
def test_distance_to_a_plane(attack, tolerance):
    model = Plane()
    model.assert_box_is_far(attack.norm)
    x_adv, queries = attack.search(model, model.x, model.y, streams(4))
    want, got = model.closed_form(attack.norm), distance(x_adv, model.x, attack.norm)
    assert want.min() > 0.01
    assert (got >= want - 1e-5).all()
    np.testing.assert_array_less(got, want * (1 + tolerance))
    assert x_adv.dtype == np.float32 and x_adv.min() >= 0 and x_adv.max() <= 1
    assert model.wrong_for(x_adv, model.y).all()
    assert queries.sum() == model.asked


# ---------------------------------------------------------------- the shared parts


@pytest.mark.parametrize("norm", ["l2", "linf"])
@pytest.mark.parametrize("tolerance, halvings", [(0.25, 2), (1e-3, 10), (1e-12, 24)])
def test_bisection_reaches_the_boundary(norm, tolerance, halvings):
    model = Plane()
    run = Run(model, model.x, model.y, streams(4), norm, None)
    noise = np.random.default_rng(9).random((4, 200, *SHAPE), dtype="float32")
    first = [rows[model.wrong_for(rows, y)][0] for rows, y in zip(noise, model.y, strict=True)]
    got = run.bisect(np.stack(first), np.arange(4), tolerance)
    assert (run.count == halvings).all()
    assert model.wrong_for(got, model.y).all()
    np.testing.assert_array_equal(run.best, got)
    for i in range(4):
        x, delta = model.x[i].astype("float64"), first[i].astype("float64") - model.x[i]
        radius = np.abs(delta).max()
        low, high = 0.0, 1.0
        for _ in range(60):
            share = (low + high) / 2
            if norm == "l2":
                moved = x + share * delta
            else:
                moved = x + np.clip(delta, -share * radius, share * radius)
            hit = model.wrong_for(moved[None], model.y[i])[0]
            low, high = (low, share) if hit else (share, high)
        want = high * (radius if norm == "linf" else np.linalg.norm(delta))
        reached = distance(got[i : i + 1], model.x[i : i + 1], norm)[0]
        size = distance(first[i][None], model.x[i : i + 1], norm)[0]
        assert -1e-6 < reached - want < size * tolerance + 1e-6


def test_bisection_with_a_tolerance_each():
    model = Plane(n=3)
    run = Run(model, model.x, model.y, streams(3), "l2", None)
    run.start(1000)
    before = run.count.copy()
    run.bisect(run.best, np.arange(3), np.array([0.5, 0.1, 1e-4]))
    np.testing.assert_array_equal(run.count - before, [1, 4, 14])


@pytest.mark.parametrize(
    "x, other",
    [
        (0.8, lambda mean: mean < 0.1),  # nearly black noise alone
        (0.9, lambda mean: (mean > 0.67) & (mean < 0.73)),  # a blend alone
    ],
)
def test_start_where_uniform_noise_has_the_label(x, other):
    shape = (2, 16, 16, 1)

    def query(images):
        return np.eye(2)[other(images.mean(axis=(1, 2, 3))).astype(int)]

    run = Run(query, np.full(shape, x), np.zeros(2, int), streams(2), "l2", None)
    run.start(1000)
    assert np.isfinite(run.distance).all()
    assert other(run.best.mean(axis=(1, 2, 3))).all()
    np.testing.assert_allclose(run.distance, distance(run.best, run.x))
    uniform = np.random.default_rng(0).random((1000, *shape[1:]))
    assert not other(uniform.mean(axis=(1, 2, 3))).any()


def test_images_of_the_start():
    """Rounds of 1, 2, 4, ... images, cut at ``tries``; what each is a blend of, and how much."""
    shown = []

    def query(images):
        shown.append(images)
        return np.tile([1.0, 0.0], (len(images), 1))

    x = np.random.default_rng(3).random((1, 16, 16, 1), dtype="float32")
    Run(query, x, np.zeros(1, int), streams(1), "l2", None).start(200)
    assert [len(images) for images in shown] == [1, 2, 4, 8, 16, 32, 64, 64, 9]
    images = np.concatenate(shown)
    for j in range(16):
        weight = (1, 0.75, 0.5, 0.25)[j // 2 % 4]
        noise = (images[j] - (1 - weight) * x[0]) / weight
        if j % 2:
            assert (np.minimum(np.abs(noise), np.abs(noise - 1)) < 1e-5).all()
        else:
            assert np.ptp(noise) == pytest.approx(1, abs=0.05)
            assert noise.mean() == pytest.approx(0.5, abs=0.1)
    means = images[1::8].mean(axis=(1, 2, 3))
    assert means.min() < 0.3 and means.max() > 0.7


def test_start_makes_few_images_at_a_time(monkeypatch):
    monkeypatch.setattr(decision, "PROBE_BYTES", 2**17)
    x, right = np.zeros((200, *SHAPE), "float32"), np.array([[1.0, 0.0]])
    run = Run(lambda u: right.repeat(len(u), 0), x, np.zeros(200, int), streams(200), "l2", None)
    tracemalloc.start()
    try:
        run.start(64)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert (run.count == 64).all()
    assert peak < 4 * 2**17  # 200 rounds of 32 images are 9.4 times as much


def test_result_is_asked_for_again():
    """One image still misclassified, one only 0.1 % farther out, one no more."""
    model = Plane(n=3)
    run = Run(model, model.x, model.y, streams(3), "l2", None)
    run.start(1000)
    run.bisect(run.best, np.arange(3), 1e-6)
    before, found = run.distance.copy(), run.best.copy()

    def strict(images):
        """The second is right up to 1.0005 of the distance it was found at, the third always."""
        back = images.astype("float64")
        which = [int(np.argmin(np.abs(model.x - row).sum(axis=(1, 2, 3)))) for row in back]
        needed = np.array([0.0, 1.0005, 9.0])[which] * before[which]
        wrong = distance(images, model.x[which]) > needed
        return np.eye(2)[np.where(wrong, 1 - model.y[which], model.y[which])]

    run.query = strict
    result = run.result()
    np.testing.assert_array_equal(result[0], found[0])
    assert distance(result[1:2], model.x[1:2])[0] == pytest.approx(1.001 * before[1], rel=1e-5)
    np.testing.assert_array_equal(result[2], model.x[2])


# ---------------------------------------------------------------- the protocol


@pytest.mark.parametrize("limit", [70, 3])
@pytest.mark.parametrize("name", QUICK)
def test_results_do_not_depend_on_the_batch(name, limit, monkeypatch):
    """Also where the images of a step take several calls, none above the limit."""
    monkeypatch.setattr(decision, "PROBE_BYTES", limit * 4 * D)
    attack = attack_of(name)
    model = Plane(n=5)
    together, queries = attack.search(model, model.x, model.y, streams(5))
    assert max(map(len, model.images)) <= limit
    for i in range(5):
        one = slice(i, i + 1)
        alone, count = attack.search(model, model.x[one], model.y[one], streams(1, first=i))
        np.testing.assert_array_equal(alone[0], together[i])
        assert count[0] == queries[i]
    other, _ = attack.search(model, model.x, model.y, streams(5, first=50))
    assert (distance(other, together) > 0).all()


@pytest.mark.parametrize("name", QUICK)
def test_only_labels_are_used(name):
    logits, labels = Plane(), Plane(one_hot=True)
    a, queries = attack_of(name).search(logits, logits.x, logits.y, streams(4))
    b, again = attack_of(name).search(labels, labels.x, labels.y, streams(4))
    np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(queries, again)
    assert logits.asked == queries.sum()
    assert (distance(a, logits.x) > 0).all()


@pytest.mark.parametrize("name", QUICK)
def test_unbreakable_example_comes_back_clean(name):
    """Only the start is paid for."""
    x, shown = Plane(n=2).x, []

    def query(images):
        shown.append(len(images))
        return np.tile([1.0, 0.0], (len(images), 1))

    x_adv, queries = attack_of(name, tries=37).search(query, x, np.zeros(2, int), streams(2))
    np.testing.assert_array_equal(x_adv, x)
    np.testing.assert_array_equal(queries, [37, 37])
    assert sum(shown) == 74


@pytest.mark.parametrize("name", QUICK)
def test_epsilon_ends_an_example_early(name):
    model = Plane()
    free, dear = attack_of(name).search(model, model.x, model.y, streams(4))
    epsilon = float(1.01 * distance(free, model.x).max())
    x_adv, queries = attack_of(name, epsilon=epsilon).search(model, model.x, model.y, streams(4))
    got = distance(x_adv, model.x)
    assert (got <= epsilon).all()
    assert (got >= distance(free, model.x)).all()
    assert (queries < dear).any() and (queries <= dear).all()


@pytest.mark.parametrize("name", QUICK)
def test_progress(name):
    model, seen = Plane(), []
    attack = attack_of(name)
    attack.search(model, model.x, model.y, streams(4), seen.append)
    assert seen == list(range(1, attack.steps + 1))


# ---------------------------------------------------------------- the steps


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_hop_skip_jump_steps(norm):
    """Numbers of probes, their radius, the bisection's length and the first jump, from the log."""
    model, steps = Plane(n=1, shift=0.005), 5
    attack = HopSkipJump(norm=norm, steps=steps, initial_evaluations=50, max_evaluations=100)
    attack.search(model, model.x, model.y, streams(1))
    sizes = np.array([len(images) for images in model.images])
    probes = np.flatnonzero(sizes >= 50)
    assert list(sizes[probes]) == [50, 70, 86, 100, 100]
    halvings = int(np.ceil(np.log2(D**2 if norm == "linf" else D**1.5)))
    adversarial = 1 - model.y[0]
    for t, call in enumerate(probes):
        search = range(call - halvings, call)
        outer = model.images[search[0] - 1]
        assert model.answers[search[0] - 1][-1] == adversarial
        hits = [model.images[i] for i in search if model.answers[i][0] == adversarial]
        base = (hits or [outer[-1:]])[-1]
        inner = [model.images[i] for i in search if model.answers[i][0] != adversarial][-1]
        before, at = (distance(images[-1:], model.x, norm)[0] for images in (outer, base))
        gap = at - distance(inner, model.x, norm)[0]
        assert 0 < gap <= before / 2**halvings * 1.01 + 1e-7
        radius = distance(model.images[call], base)
        want = 0.1 if t == 0 else before / D
        np.testing.assert_allclose(radius, want, rtol=1e-3)
        # Uniform in a cube of side 2 (3.4 standard deviations), or normal.
        reach = np.abs(model.images[call] - base).max() / want * np.sqrt(D)
        assert reach < 2.5 if norm == "linf" else reach > 2.5
        jump = distance(model.images[call + 1], base, norm)[0]
        assert jump == pytest.approx(at / np.sqrt(t + 1), rel=1e-5)
        if norm == "linf":
            jumped = model.images[call + 1].astype("float64")
            inside = (jumped > 0) & (jumped < 1)
            assert inside.mean() > 0.8
            np.testing.assert_allclose(np.abs(jumped - base)[inside], jump, rtol=1e-5)


def test_hop_skip_jump_direction():
    """The baseline-subtracted mean of the unit vectors that were shown, and without a baseline."""
    model = Plane(n=2)
    attack, which = HopSkipJump(), np.arange(2)
    run = Run(model, model.x, model.y, streams(2), "l2", None)
    # One just across the boundary, one far beyond it: there all probes agree.
    side = np.array([1.001, 2.5]) * (model.value(model.x) - model.level) / (model.a @ model.a)
    here = run.image(model.x.reshape(2, D) - side[:, None] * model.a)
    got = attack._direction(run, here, which, np.array([0.05, 0.05]), 600)
    shown = model.images[0].reshape(2, 600, D).astype("float64")
    s = np.where(model.answers[0].reshape(2, 600) == 1 - model.y[:, None], 1.0, -1.0)
    assert abs(s[0].mean()) < 0.5 and (s[1] == 1).all()
    u = (shown - here.reshape(2, 1, D)) / 0.05
    np.testing.assert_allclose(np.linalg.norm(u, axis=2), 1, rtol=1e-4)
    v = np.stack([((s[0] - s[0].mean())[:, None] * u[0]).mean(axis=0), u[1].mean(axis=0)])
    want = v / np.linalg.norm(v, axis=1, keepdims=True)
    np.testing.assert_allclose(got, want, atol=1e-5)
    toward = -np.sign(model.value(model.x[:1]) - model.level) * model.a / np.linalg.norm(model.a)
    assert got[0] @ toward > 0.9


def test_boundary_attack_step():
    model = Plane(n=1)
    attack = BoundaryAttack(steps=21, spherical_step=0.2, source_step=0.03)
    attack.search(model, model.x, model.y, streams(1))
    calls = len(model.images)
    # From the end: the last look; then per step one call, two in steps 0, 10 and 20.
    first = calls - 1 - (21 + 3)
    found = [
        images[answers == 1 - model.y[0]]
        for images, answers in zip(model.images[:first], model.answers[:first], strict=True)
    ]
    best = np.concatenate(found)
    best = best[distance(best, model.x).argmin()]
    image, side = (model.images[first + i].astype("float64")[0] for i in (0, 1))
    x = model.x[0].astype("float64")
    size = np.linalg.norm(best - x)
    assert np.linalg.norm(side - x) == pytest.approx(size, rel=1e-5)
    angle = np.sum((side - x) * (best - x)) / size**2
    assert angle == pytest.approx(1 / np.sqrt(1 + 0.2**2), rel=1e-5)
    np.testing.assert_allclose(image, x + 0.97 * (side - x), atol=1e-6)


def test_boundary_attack_step_at_the_edge_of_the_box():
    """Where clipping brings ``side`` nearer, less is left to go, or nothing."""
    model = Plane(n=3)
    model.x[:] = np.array([0.5, 0.01, 0.01])[:, None, None, None]
    run = Run(model, model.x, model.y, streams(3), "l2", None)
    run.best = run.x + np.where(np.arange(D) % 2, 0.01, -0.01).astype("float32").reshape(SHAPE)
    run.distance = run.distances(run.best, np.arange(3))
    source = np.array([0.02, 0.3, 0.02])
    side, image = BoundaryAttack._propose(run, np.arange(3), np.full(3, 1.0), source)
    far = distance(side, model.x)
    assert far[0] == pytest.approx(run.distance[0], rel=1e-5)
    assert (far[1:] < 0.97 * run.distance[1:]).all() and far[1] > 0.8 * run.distance[1]
    want = np.minimum(far, (1 - source) * run.distance)
    np.testing.assert_allclose(distance(image, model.x), want, rtol=1e-5)


def test_boundary_attack_step_sizes():
    """Nothing before a window is full, 1.5 up or down outside the limits, then a new window."""
    window, which = Window(4, 10), np.arange(4)
    shares = np.array([6, 5, 2, 1])  # of 10
    for i in range(10):
        assert (window.factors(which, 0.2, 0.5) == 1).all()
        window.add(which, i < shares)
    np.testing.assert_allclose(window.factors(which, 0.2, 0.5), [1.5, 1, 1, 1 / 1.5])
    window.add(which[:2], np.array([True, True]))  # a sixth yes in place of the oldest, a yes
    np.testing.assert_allclose(window.factors(which, 0.2, 0.5), 1)
    for _ in range(9):
        window.add(which, np.ones(4, bool))
    np.testing.assert_allclose(window.factors(which, 0.2, 0.5), [1.5, 1.5, 1.5, 1])


@pytest.mark.parametrize("level, up", [(1e9, False), (-1e9, True)])
def test_boundary_attack_adapts_both_step_sizes(level, up, monkeypatch):
    """All misclassified or none: after 30 probes the source step, after 100 both."""
    model = Plane(n=1)
    run = Run(model, model.x, np.zeros(1, int), streams(1), "l2", None)
    run.best = run.x + np.float32(0.2)
    run.distance = run.distances(run.best, np.arange(1))
    model.level, seen = level, []
    propose = BoundaryAttack._propose

    def spy(run, active, sphere, source):
        seen.append((sphere[0], source[0]))
        run.best[0], run.distance[0] = run.x[0] + np.float32(0.2), 0.2 * np.sqrt(D)
        return propose(run, active, sphere, source)

    factors, limits = Window.factors, set()

    def spy_on_limits(window, which, low, high):
        limits.add((window.answers.shape, low, high))
        return factors(window, which, low, high)

    monkeypatch.setattr(Window, "factors", spy_on_limits)
    monkeypatch.setattr(BoundaryAttack, "_propose", staticmethod(spy))
    monkeypatch.setattr(run, "bisect", lambda *args: None)
    BoundaryAttack(steps=1000, spherical_step=0.01, source_step=0.01).walk(run, lambda done: None)
    assert limits == {((1, 100), 0.2, 0.5), ((1, 30), 0.1, 0.25)}
    sphere, source = np.array(seen).T
    power = (1 if up else -1) * np.ones(1000)
    done = np.arange(1000)
    np.testing.assert_allclose(sphere, 0.01 * 1.5 ** (power * (done > 990)))
    # The 30th probe is step 290's; each change begins a new window.
    changes = (done > 290).astype(int) + (done > 590) + (done > 890) + (done > 990)
    np.testing.assert_allclose(source, 0.01 * 1.5 ** (power * changes))


@pytest.mark.parametrize("source_step, done", [(1.1e-7, [1, 2, 3]), (0.9e-7, [])])
def test_boundary_attack_ends_where_it_hardly_moves(source_step, done):
    model, seen = Plane(), []
    attack = BoundaryAttack(steps=3, source_step=source_step)
    attack.search(model, model.x, model.y, streams(4), seen.append)
    assert seen == done


def test_sign_opt_ends_after_three_failures(monkeypatch):
    """Each time with a tenth of ``beta``, from ``alpha`` = 1."""
    model, seen = Plane(n=1), []

    def fail(run, active, theta, descent, alpha, beta):
        seen.append((alpha[0], beta[0]))
        alpha[active] = 0.9e-4

    monkeypatch.setattr(SignOPT, "_line_search", staticmethod(fail))
    SignOPT(steps=9).search(model, model.x, model.y, streams(1))
    np.testing.assert_allclose(seen, [(0.2, 1e-3), (1, 1e-4), (1, 1e-5)])


def test_sign_opt_step():
    """Radius and angle of the probes, and the first try of the line search, from the log."""
    model, directions = Plane(n=1), 90
    attack = SignOPT(steps=1, directions=directions, alpha=0.3, beta=0.002)
    attack.search(model, model.x, model.y, streams(1))
    call = next(i for i, images in enumerate(model.images) if len(images) == directions)
    x, adversarial = model.x.reshape(1, D).astype("float64"), 1 - model.y[0]
    # 0.002 / 500: 18 halvings just before.
    hits = [
        images
        for images, answers in zip(
            model.images[call - 18 : call], model.answers[call - 18 : call], strict=True
        )
        if answers[0] == adversarial
    ]
    best = hits[-1].reshape(1, D) - x
    g = np.linalg.norm(best)
    theta = best[0] / g
    probes = model.images[call].reshape(directions, D) - x
    np.testing.assert_allclose(np.linalg.norm(probes, axis=1), g, rtol=1e-6)
    turned = probes / g - theta
    across = turned - np.outer(turned @ theta, theta)
    angle = np.linalg.norm(across, axis=1) / 0.002
    assert angle.max() < 1.001 and angle.min() > 0.8
    s = np.where(model.answers[call] == adversarial, 1.0, -1.0)
    descent = (s[:, None] * across).mean(axis=0) / 0.002
    tried = (model.images[call + 1].reshape(D) - x[0]) / g
    assert np.linalg.norm(tried) == pytest.approx(1, rel=1e-5)
    share = tried @ theta
    moved = (tried - share * theta) / share
    cosine = moved @ descent / np.linalg.norm(moved) / np.linalg.norm(descent)
    assert cosine > 0.999
    assert np.linalg.norm(moved) == pytest.approx(0.3 * np.linalg.norm(descent), rel=0.03)


# ---------------------------------------------------------------- options


@pytest.mark.parametrize(
    "attack",
    [
        HopSkipJump(0.3, "linf", 7, 2, 11, 13, 0.5, 17),
        BoundaryAttack(0.3, "l2", 7, 2, 0.1, 0.2, 17),
        SignOPT(0.3, "l2", 7, 2, 11, 0.1, 0.2, 17),
    ],
    ids=lambda attack: attack.name,
)
def test_config_round_trip(attack):
    again = type(attack).from_config(attack.get_config())
    assert again.describe() == attack.describe()
    assert again.epsilon == 0.3 and again.steps == 7 and again.restarts == 2 and again.tries == 17
    assert ATTACKS.get(attack.name) is type(attack)
    assert type(attack)().epsilon is None
    assert attack.needs == "labels" and not attack.bounded


@pytest.mark.parametrize(
    "name, options",
    [
        ("hopskipjump", {"norm": "l1"}),
        ("boundary", {"norm": "linf"}),
        ("sign-opt", {"norm": "linf"}),
        ("hopskipjump", {"gamma": 0.0}),
        ("hopskipjump", {"gamma": True}),
        ("hopskipjump", {"initial_evaluations": 0}),
        ("hopskipjump", {"max_evaluations": 1.5}),
        ("boundary", {"spherical_step": -0.1}),
        ("boundary", {"source_step": float("inf")}),
        ("sign-opt", {"directions": 0}),
        ("sign-opt", {"alpha": "1"}),
        ("sign-opt", {"beta": 0}),
        ("boundary", {"tries": 0}),
        ("sign-opt", {"steps": 0}),
        ("hopskipjump", {"epsilon": -1}),
    ],
)
def test_bad_options(name, options):
    with pytest.raises(UserError, match=r"(norm|must be a).*Received: ") as caught:
        ATTACKS.get(name)(**options)
    assert next(iter(options)) in str(caught.value) and "\n" not in str(caught.value)
