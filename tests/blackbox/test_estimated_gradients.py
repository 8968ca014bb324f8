"""NES and SPSA: estimates against true gradients, steps against loops, and the contract."""

import keras
import numpy as np
import pytest

from keras_emr.attacks import ATTACKS, estimated_gradient
from keras_emr.attacks.ball import project
from keras_emr.attacks.nes import NES
from keras_emr.attacks.spsa import SPSA
from keras_emr.errors import UserError
from tests.blackbox.models import (
    Asked,
    Linear,
    Wavy,
    assert_alone_as_together,
    assert_feasible,
    margin,
    sizes,
    streams,
)

ATTACK = {"nes": NES, "spsa": SPSA}


class Quadratic(Linear):
    """Two classes whose margin is a quadratic function of the image."""

    def __call__(self, images):
        return self.each(
            images, lambda row: np.array([5.0 + row @ self.w[:, 0] + 3 * row @ row, 0])
        )


def raised(model, x):
    """Gradient of ``z_1 - z_0``."""
    if isinstance(model, Quadratic):
        return -(model.w[:, 0] + 6 * x.reshape(len(x), -1).astype("float64")).reshape(x.shape)
    return np.broadcast_to((model.w[:, 1] - model.w[:, 0]).reshape(x.shape[1:]), x.shape)


# ---------------------------------------------------------------- the estimate


@pytest.mark.parametrize("kind", [Linear, Quadratic])
@pytest.mark.parametrize(
    "attack",
    [NES(0.1, samples=20000, sigma=0.1), NES(0.1, samples=20000), SPSA(0.1, samples=20000)],
    ids=["nes, far", "nes", "spsa"],
)
def test_estimate_nears_the_gradient(kind, attack):
    """Relative error of n samples in d dimensions: about sqrt(d / n) = 0.024; asserted: 0.06.

    A pair of opposite probes cancels what is quadratic, however far apart.
    """
    model = kind((3, 2, 3, 2), 2, lead=30.0)
    got = attack.gradient(model, model.x, np.zeros(3, int), streams(3))
    want = raised(model, model.x)
    error = sizes(got, want, "l2") / sizes(want, 0 * want, "l2")
    assert got.shape == model.x.shape and (error < 0.06).all(), error


def test_estimate_raises_the_margin_of_the_strongest_rival():
    model = Linear((3, 2, 3, 2), 4, lead=30.0)
    model.b[2] += 20.0
    got = NES(0.1, samples=20000).gradient(model, model.x, np.zeros(3, int), streams(3))
    want = (model.w[:, 2] - model.w[:, 0]).reshape(1, 2, 3, 2)
    assert (sizes(got - want, 0 * got, "l2") < 0.06 * np.linalg.norm(want)).all()


@pytest.mark.parametrize("attack", [NES(0.1, samples=40, sigma=0.02), SPSA(0.1, samples=40)])
def test_probes_are_opposite_and_of_the_documented_kind(attack):
    model = Linear((3, 4, 5, 1), 2)
    query = Asked(model)
    attack.gradient(query, model.x, np.zeros(3, int), streams(3))
    (probes,) = query.batches
    probes = probes.reshape(3, 2, 40, 4, 5, 1) - model.x[:, None, None]
    np.testing.assert_allclose(probes[:, 0], -probes[:, 1], atol=2e-7)
    directions = probes[:, 0] / attack.probe_distance
    # No two images, and no two samples, share a pattern.
    rows = np.round(directions, 3).reshape(120, -1)
    assert len(np.unique(rows, axis=0)) == 120
    if isinstance(attack, SPSA):
        np.testing.assert_allclose(np.abs(directions), 1, atol=1e-4)
        assert abs(directions.mean()) < 0.1  # 2400 signs: sd 0.02
    else:
        assert abs(directions.mean()) < 0.1 and abs(directions.std() - 1) < 0.08
        assert np.abs(directions).max() > 2.5


@pytest.mark.parametrize("name", ATTACK)
def test_probes_are_asked_for_in_parts(monkeypatch, name):
    model = Linear((5, 4, 5, 1), 2)
    attack = ATTACK[name](0.1, samples=50)
    whole = attack.gradient(model, model.x, np.zeros(5, int), streams(5))
    for images, longest in ((250, 200), (60, 60), (1, 2)):
        monkeypatch.setattr(estimated_gradient, "_PROBE_BYTES", images * 4 * 20)
        query = Asked(model)
        parts = attack.gradient(query, model.x, np.zeros(5, int), streams(5))
        sizes_asked = [len(batch) for batch in query.batches]
        assert max(sizes_asked) == longest and sum(sizes_asked) == 5 * 2 * 50
        if name == "nes" or images > 100:  # the signs are drawn by the part
            np.testing.assert_allclose(parts, whole, rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------- the steps


def naive_nes(attack, x, gradient):
    alpha = attack.step_size or 2.5 * attack.epsilon / attack.steps
    image, path = x.copy(), []
    for _ in range(attack.steps):
        g = gradient(image)
        norm = np.sqrt((g**2).sum())
        image = image + alpha * (np.sign(g) if attack.norm == "linf" else g / norm)
        image = naive_project(image, x, attack)
        path.append(image)
    return path


def naive_spsa(attack, x, gradient):
    image, path, m, v = x.copy(), [], 0.0, 0.0
    for t in range(1, attack.steps + 1):
        g = gradient(image)
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
        rate = attack.learning_rate * np.sqrt(1 - 0.999**t) / (1 - 0.9**t)
        image = image + rate * m / (np.sqrt(v) + 1e-8 * np.sqrt(1 - 0.999**t))
        image = naive_project(image, x, attack)
        path.append(image)
    return path


def naive_project(image, x, attack):
    delta = image - x
    if attack.norm == "linf":
        delta = np.minimum(np.maximum(delta, -attack.epsilon), attack.epsilon)
    elif np.sqrt((delta**2).sum()) > attack.epsilon:
        delta = delta * attack.epsilon / np.sqrt((delta**2).sum())
    return np.minimum(np.maximum(x + delta, 0), 1)


@pytest.mark.parametrize("norm, epsilon", [("linf", 0.07), ("l2", 0.25)])
@pytest.mark.parametrize(
    "name, options",
    [("nes", {}), ("nes", {"step_size": 0.03}), ("spsa", {}), ("spsa", {"learning_rate": 0.05})],
)
def test_steps_against_a_loop(monkeypatch, name, options, norm, epsilon):
    """With the true gradient (which turns and changes sign) in place of the estimate."""
    model = Linear((4, 3, 4, 2), 2, lead=60.0)
    phase = np.random.default_rng(1).normal(size=(3, 4, 2))
    attack = ATTACK[name](epsilon, norm, steps=25, **options)

    def turning(image):
        return np.cos(40.0 * np.asarray(image, "float64") + phase)

    monkeypatch.setattr(attack, "gradient", lambda query, image, y, streams: turning(image))
    query = Asked(model)
    attack.search(query, model.x, model.y, streams(4))
    naive = {"nes": naive_nes, "spsa": naive_spsa}[name]
    for i, x in enumerate(model.x.astype("float64")):
        got = np.array([batch[i] for batch in query.batches])
        # Rounding to float32 grows along the path.
        np.testing.assert_allclose(got[:6], naive(attack, x, turning)[:6], rtol=0, atol=2e-6)
        np.testing.assert_allclose(got, naive(attack, x, turning), rtol=0, atol=2e-3)


def test_projection_leaves_room_for_rounding():
    """Flat images: every pixel is rounded the same way."""
    for level in np.linspace(0.51, 0.73, 12):
        x = np.full((1, 64, 64, 3), level, "float32")
        for epsilon in (0.5, 1.0, 3.0):
            found = project(x + 0.2, x, epsilon, "l2")
            assert epsilon - 1e-5 < sizes(found, x, "l2")[0] <= epsilon + 1e-9
            inside = project(x + np.float32(1e-3), x, epsilon, "l2")
            np.testing.assert_allclose(inside, x + np.float32(1e-3), atol=1e-7)


# ---------------------------------------------------------------- strength


@pytest.mark.parametrize(
    "attack",
    [NES(0.1, steps=40, samples=100), SPSA(0.1, steps=60, samples=100)],
    ids=["nes", "spsa"],
)
def test_linf_nears_the_worst_margin_of_a_linear_model(attack):
    """The last iterate: at least 97% of ``epsilon ||w||_1``, and never more."""
    model = Linear((4, 5, 5, 1), 2, low=0.2, high=0.8, lead=60.0)
    query = Asked(model)
    x_adv, queries = attack.search(query, model.x, model.y, streams(4))
    last = query.batches[-1]
    assert_feasible(last, model.x, 0.1, "linf")
    gained = [margin(0, a) - margin(0, b) for a, b in zip(model(model.x), model(last), strict=True)]
    most = 0.1 * np.abs(model.w[:, 0] - model.w[:, 1]).sum()
    assert min(gained) >= 0.97 * most and max(gained) <= most + 1e-5, np.array(gained) / most
    np.testing.assert_array_equal(x_adv, model.x)  # none is broken
    assert (queries == attack.steps * 201).all()


# ---------------------------------------------------------------- contract

CASES = [
    *[(NES(0.02, steps=8, samples=20), "linf"), (NES(0.1, "l2", steps=8, samples=20), "l2")],
    *[(SPSA(0.01, steps=8, samples=20), "linf"), (SPSA(0.05, "l2", steps=8, samples=20), "l2")],
]


@pytest.mark.parametrize("limit", [64 * 2**20, 3000])
@pytest.mark.parametrize("attack, norm", CASES)
def test_alone_as_together(monkeypatch, attack, norm, limit):
    monkeypatch.setattr(estimated_gradient, "_PROBE_BYTES", limit)
    model = Wavy((8, 5, 4, 3), seed=2)
    _, queries = assert_alone_as_together(attack, model)
    assert len(set(queries)) > 2


@pytest.mark.parametrize("attack, norm", CASES)
def test_queries_results_and_the_unbreakable(attack, norm):
    model = Wavy((8, 5, 4, 3), seed=2)
    query, seen = Asked(model), []
    x_adv, queries = attack.search(query, model.x, model.y, streams(8), seen.append)
    assert queries.tolist() == query.per_example().tolist()
    # Probes of all that are not finished, then their iterates.
    for probes, iterates in zip(query.batches[::2], query.batches[1::2], strict=True):
        assert len(probes) == 40 * len(iterates)
    assert min(queries) < 8 * 41 == max(queries) and seen == list(range(1, 9))
    assert_feasible(x_adv, model.x, attack.epsilon, norm)
    broken = model(x_adv).argmax(-1) != model.y
    assert 0 < broken.sum() < 8
    assert broken[queries < 8 * 41].all()
    np.testing.assert_array_equal(x_adv[~broken], model.x[~broken])
    assert (sizes(x_adv, model.x, norm)[broken] > 0).all()


@pytest.mark.parametrize("name", ATTACK)
def test_stops_when_all_are_broken(name):
    model = Linear((2, 5, 5, 1))
    seen = []
    attack = ATTACK[name](0.9, steps=500, samples=10)
    x_adv, queries = attack.search(model, model.x, model.y, streams(2), seen.append)
    assert (model(x_adv).argmax(-1) != model.y).all()
    assert len(seen) == max(queries) // 21 < 500


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("name", ATTACK)
def test_no_budget(name, norm):
    model = Linear((2, 3, 3, 1))
    query = Asked(model)
    x_adv, _ = ATTACK[name](0, norm, steps=3, samples=5).search(query, model.x, model.y, streams(2))
    np.testing.assert_array_equal(x_adv, model.x)
    np.testing.assert_array_equal(query.batches[-1], model.x)


DEFAULTS = {
    "nes": {"samples": 50, "sigma": 0.01, "step_size": None},
    "spsa": {"samples": 128, "delta": 0.01, "learning_rate": 0.01},
}


@pytest.mark.parametrize("name", ATTACK)
def test_defaults_and_saving(name):
    attack = ATTACKS.get(name)(0.3)
    common = {"epsilon": 0.3, "norm": "linf", "steps": 100, "restarts": 1}
    assert attack.get_config() == {**common, **DEFAULTS[name]}
    assert (attack.name, attack.needs, attack.bounded) == (name, "scores", True)
    changed = {k: 0.5 for k in DEFAULTS[name] if k != "samples"}
    other = ATTACK[name](0.5, "l2", 10, samples=7, restarts=3, **changed)
    saved = keras.saving.serialize_keras_object(other)
    assert keras.saving.deserialize_keras_object(saved).get_config() == other.get_config()


def test_step_size_by_default():
    assert NES(0.3, steps=100).alpha == pytest.approx(0.0075)
    assert NES(0.3, step_size=0.01).alpha == 0.01


@pytest.mark.parametrize(
    "name, options",
    [
        *[(name, {"epsilon": None}) for name in ATTACK],
        *[(name, {"norm": "l1"}) for name in ATTACK],
        *[(name, {"samples": 0}) for name in ATTACK],
        *[("nes", {"sigma": value}) for value in (0, -1, None)],
        ("nes", {"step_size": -0.1}),
        *[("spsa", {"delta": value}) for value in (0, "x")],
        *[("spsa", {"learning_rate": value}) for value in (0, -1)],
    ],
)
def test_bad_options(name, options):
    with pytest.raises(UserError, match=r"^[^\n]*Received: [^\n]*$"):
        ATTACK[name](**{"epsilon": 0.3, **options})
