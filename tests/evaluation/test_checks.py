"""Gradient-masking and sanity checks: planted faults are found, and a sound model fires none."""

from types import SimpleNamespace

import keras
import numpy as np
import pytest
from keras import layers, ops

import keras_emr as ke
from keras_emr.attacks import ATTACKS
from keras_emr.evaluation.autoattack import AutoAttack
from keras_emr.evaluation.batching import padded
from keras_emr.evaluation.checks import ORDER, Budget, run_checks
from keras_emr.evaluation.checks.ascent import Ascent
from keras_emr.evaluation.checks.attacks import _point
from keras_emr.evaluation.checks.base import graded
from keras_emr.evaluation.checks.bench import Bench
from keras_emr.evaluation.checks.gradients import disagreement
from keras_emr.evaluation.robust_accuracy import AttackResult
from keras_emr.sampling import example_streams
from tests.builders import assert_same, snapshot

SMALL = Budget(
    steps=8, strong_steps=12, strong_restarts=2, square_steps=40, random_points=12,
    gradient_points=20,
)  # fmt: skip
N, K, EPS = 40, 4, 0.05
BY_GRADIENT = ("M1", "M2", "M3", "M4", "M5", "M6", "M7", "M8", "M9", "M15", "M16")


def patterns(n=N, seed=0):
    """Images with the pattern of their class; two labels are wrong."""
    rng = np.random.default_rng(seed)
    y = rng.integers(0, K, n).astype("int32")
    signs = np.sign(np.random.default_rng(7).normal(size=(K, 6, 6, 1)))
    x = np.clip(0.5 + 0.12 * signs[y] + 0.15 * rng.normal(size=(n, 6, 6, 1)), 0, 1)
    wrong = y.copy()
    wrong[:2] = (wrong[:2] + 1) % K
    return x.astype("float32"), y, wrong


X, TRUE, Y = patterns()
_WEIGHTS = {}


def trained(seed=1, last=()):
    """conv - BatchNorm - relu - dense, the same on every backend; ``last``: layers on top."""
    model = keras.Sequential(
        [
            keras.Input((6, 6, 1)),
            layers.Conv2D(6, 3),
            layers.BatchNormalization(momentum=0.8),
            layers.Activation("relu"),
            layers.Flatten(),
            layers.Dense(K),
        ]
    )
    if seed not in _WEIGHTS:
        rng = np.random.default_rng(seed)
        for weight in model.trainable_weights:
            if len(weight.shape) > 1:
                fan_in = np.prod(weight.shape[:-1])
                weight.assign(rng.normal(size=weight.shape) / np.sqrt(fan_in))
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile(keras.optimizers.Adam(3e-3), loss)
        model.fit(*patterns(200, seed=3)[:2], epochs=12, batch_size=50, shuffle=False, verbose=0)
        _WEIGHTS[seed] = model.get_weights()
    model.set_weights(_WEIGHTS[seed])
    return keras.Sequential([model, *last]) if last else model


@pytest.fixture(scope="module")
def model():
    return trained()


@pytest.fixture(scope="module")
def sibling():
    return trained(seed=2)


@pytest.fixture(scope="module")
def result(model):
    suite = AutoAttack(
        EPS,
        attacks=[ATTACKS.get("apgd")(EPS, steps=20), ATTACKS.get("square")(EPS, steps=30)],
    )
    return suite.run(model, X, Y)


@pytest.fixture(scope="module")
def by_pgd(model):
    """What separate evaluations say of the model: PGD on either loss."""
    return {
        objective: ke.evaluate_attack(model, ke.PGD(EPS, steps=8, objective=objective), X, Y)
        for objective in ("cross_entropy", "dlr")
    }


def check(model, *ids, x=X, y=Y, epsilon=EPS, **options):
    found = run_checks(model, x, y, epsilon, only=ids, **{"budget": SMALL, **options})
    assert [c.id for c in found] == [id for id in ORDER if id in ids]
    return found if len(found) > 1 else found[0]


def fired(checks):
    return {c.id for c in checks if c.verdict in ("warn", "fail")}


def logits(model, x):
    return ops.convert_to_numpy(model(ops.convert_to_tensor(x), training=False))


def right(model, x, y=Y):
    return logits(model, x).argmax(1) == y


def changed(result, **fields):
    names = ("correct", "robust", "x_adv", "attacks", "accuracy", "robust_accuracy")
    kept = {n: getattr(result, n) for n in names if hasattr(result, n)}
    return SimpleNamespace(**{**kept, **fields})


class OnMean(keras.Model):
    """Classes 0 and 1 by a function of the mean pixel's distance from 0.5; 2 and 3 never."""

    def __init__(self, gap):
        super().__init__()
        self.gap = gap

    def call(self, x):
        gap = self.gap(ops.mean(x, axis=(1, 2, 3)) - 0.5)
        return ops.stack([gap, 0 * gap, 0 * gap - 9, 0 * gap - 10], axis=-1)


class Fragile(keras.Model):
    """Another class wherever the mean pixel has moved a little."""

    def call(self, x):
        mean = ops.mean(x, axis=(1, 2, 3))
        return ops.stack([ops.sin(300 * mean + k * np.pi / 2) for k in range(K)], axis=-1)


GREY = (0.5 + 0.001 * np.random.default_rng(2).normal(size=(N, 6, 6, 1))).astype("float32")
ZEROS = np.zeros(N, "int32")


# A sound model ----------------------------------------------------------------------------------


def test_a_sound_model_and_evaluation_fire_nothing(model, sibling, result):
    natural = Fragile()
    before, seen = snapshot(model.variables), []
    checks = run_checks(
        model, X, Y, EPS, result=result, siblings=[sibling], natural=natural, certified=0.1,
        budget=SMALL, progress=lambda *a: seen.append(a),
    )  # fmt: skip
    assert tuple(c.id for c in checks) == ORDER and len(ORDER) == 23
    assert {c.id: (c.verdict, c.text) for c in checks if c.verdict != "pass"} == {}
    assert all(c.title and c.text.endswith(".") and "\n" not in c.text for c in checks)
    assert seen == [(id, i + 1, 23) for i, id in enumerate(ORDER)]
    assert 0.1 < result.robust_accuracy < result.accuracy < 1
    assert_same(before, snapshot(model.variables))


def test_values_are_those_of_separate_evaluations(model, sibling, by_pgd):
    def accuracy(attack):
        return ke.evaluate_attack(model, attack, X, Y).robust_accuracy

    m = {c.id: c for c in check(model, *BY_GRADIENT, siblings=[sibling])}
    clean = right(model, X)
    weak, dlr = by_pgd["cross_entropy"], by_pgd["dlr"].robust_accuracy
    fgsm, longer = accuracy(ke.FGSM(EPS)), ke.PGD(EPS, steps=12, restarts=2)
    strong = weak.robust & ke.evaluate_attack(model, longer, X, Y).robust
    assert 0.2 < weak.robust_accuracy < clean.mean() < 1
    assert m["M1"].details["fgsm"] == pytest.approx(fgsm)
    assert m["M1"].value == pytest.approx(weak.robust_accuracy - fgsm)
    assert m["M5"].value == pytest.approx(weak.robust_accuracy - strong.mean())
    assert m["M6"].value == pytest.approx(weak.robust_accuracy - dlr)
    square = accuracy(ATTACKS.get("square")(EPS, steps=40))
    assert m["M2"].details["square"] == pytest.approx(square)
    assert right(sibling, X)[clean].all()  # else its own errors would not be attacked
    sent = ke.evaluate_attack(sibling, ke.PGD(EPS, steps=8), X, Y).x_adv
    transfer = (right(model, sent) & clean).mean()
    assert m["M2"].details["transfer from sibling 0"] == pytest.approx(transfer)
    assert m["M2"].details["white_box"] <= strong.mean()
    assert m["M2"].value == pytest.approx(m["M2"].details["white_box"] - min(square, transfer))
    assert m["M4"].details["accuracy"][0] == clean.mean()
    assert m["M4"].details["epsilon"] == pytest.approx([0, EPS / 4, EPS / 2, EPS, 2 * EPS, 4 * EPS])
    assert m["M4"].details["accuracy"][3] <= weak.robust_accuracy
    assert m["M7"].details["tried_on"] == round(m["M2"].details["white_box"] * N)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_pgd_of_the_checks_is_that_of_a_numpy_reference(norm):
    """A linear model, whose gradients are known."""
    rng = np.random.default_rng(3)
    kernel = rng.normal(size=(36, K)).astype("float32")
    linear = keras.Sequential([keras.Input((6, 6, 1)), layers.Flatten(), layers.Dense(K)])
    linear.layers[-1].kernel.assign(kernel)
    y = logits(linear, X).argmax(1).astype("int32")
    epsilon = 0.03 if norm == "linf" else 0.15
    attack = ke.PGD(epsilon, norm, steps=6)
    # Two batches, of which the second is padded.
    got = Ascent(linear, norm, 25).run(attack, X, y, np.arange(N), restart=1, seed=4)
    for i, stream in enumerate(example_streams(4, 1, range(N))):
        x = X[i].reshape(-1).astype("float64")
        if norm == "linf":
            image = x + epsilon * stream.uniform(-1, 1, (6, 6, 1)).reshape(-1)
        else:
            direction = stream.normal(size=(6, 6, 1)).reshape(-1)
            image = x + epsilon * stream.uniform(0, 1) * direction / np.linalg.norm(direction)
        image = np.clip(image, 0, 1)
        losses, wrong = [], []
        for step in range(7):
            z = image @ kernel
            p = np.exp(z - z.max()) / np.exp(z - z.max()).sum()
            losses.append(-np.log(p[y[i]]))
            wrong.append(z.argmax() != y[i])
            gradient = kernel @ (p - np.eye(K)[y[i]])
            if step == 0:
                assert got.first_slope[i] == pytest.approx(np.abs(gradient).sum(), rel=1e-3)
            if step < 6:
                if norm == "linf":
                    image = image + 2.5 * epsilon / 6 * np.sign(gradient)
                    image = np.clip(image, x - epsilon, x + epsilon)
                else:
                    image = image + 2 * epsilon / 6 * gradient / np.linalg.norm(gradient)
                    length = np.linalg.norm(image - x)
                    image = x + (image - x) * min(1, epsilon / length)
                image = np.clip(image, 0, 1)
        np.testing.assert_allclose(got.images[i].reshape(-1), image, atol=2e-6)
        assert got.first_loss[i] == pytest.approx(losses[0], rel=1e-3, abs=1e-5)
        assert got.last_loss[i] == pytest.approx(losses[-1], rel=1e-3, abs=1e-5)
        assert (got.ever_wrong[i], got.right[i]) == (any(wrong), not wrong[-1])
        assert got.first_right[i] == (not wrong[0])
    assert 0 < got.right.sum() < N and got.ever_wrong.any()


# Faults of the model ----------------------------------------------------------------------------


def test_quantised_logits_hide_gradients():
    rounded = trained(last=[layers.Lambda(lambda z: ops.round(8 * z) / 8)])
    checks = check(rounded, *BY_GRADIENT, "M10", "M11", epsilon=0.2)
    found = {c.id: c for c in checks}
    assert {"M2", "M3", "M5", "M7", "M8", "M9"} <= fired(checks)
    assert not fired(checks) & {"M10", "M11"}
    assert found["M9"].verdict == "fail" and found["M9"].value == 1.0
    assert found["M9"].details["exactly_zero"]["dlr_clean"] == 1.0
    assert found["M7"].value == found["M7"].details["found"] / N > 0


def test_saturated_logits_blind_the_cross_entropy_alone():
    # A power of two: the product is exact, however a compiler fuses it with what follows.
    saturated = trained(last=[layers.Rescaling(2.0**13)])
    checks = check(saturated, "M6", "M8", "M9", "M10")
    assert {c.id: c.verdict for c in checks} == {
        "M6": "fail", "M8": "pass", "M9": "warn", "M10": "pass"
    }  # fmt: skip
    z = logits(saturated, X).astype("float64")
    probability = np.exp(z - z.max(1, keepdims=True))[np.arange(N), Y]
    clean = z.argmax(1) == Y
    others = np.exp(z - z.max(1, keepdims=True)).sum(1) - probability
    flat = (others[clean] < 2**-24).mean()
    assert checks[2].details["cross_entropy_clean"] == pytest.approx(flat) and flat > 0.9
    assert checks[2].details["dlr_clean"] == 0
    details = checks[0].details
    assert checks[0].value == details["cross_entropy"] - details["dlr"] > 0.05


def test_gradients_that_are_not_the_models_are_found(model):
    half = keras.Sequential(
        [keras.Input((6, 6, 1)), layers.Lambda(lambda x: (x + ops.stop_gradient(x)) / 2), model]
    )
    # A direction along which a derivative is less than a tenth of its usual size does not show.
    assert check(half, "M8").verdict == "fail" and check(half, "M8").value >= 0.8
    sound = check(model, "M8")
    assert (sound.verdict, sound.value, sound.details["points"]) == ("pass", 0, 20)
    assert sound.details["median"] < 0.01


def test_kinks_of_pooling_and_relu_are_not_taken_for_wrong_gradients():
    """A flat image: all windows of the pooling tie, and each side has a slope of its own."""
    pooled = keras.Sequential(
        [
            keras.Input((6, 6, 1)),
            layers.Conv2D(6, 3, activation="relu"),
            layers.MaxPooling2D(2),
            layers.Flatten(),
            layers.Dense(K),
        ]
    )
    rng = np.random.default_rng(0)
    for weight in pooled.weights:
        weight.assign(rng.normal(0, 0.5, weight.shape))
    flat = np.full_like(X, 0.5)
    found = check(pooled, "M8", x=flat, y=logits(pooled, flat).argmax(1))
    assert (found.verdict, found.value) == ("pass", 0), found


def test_gradients_are_compared_with_the_difference_over_a_path():
    directions = np.array([[1.0, -1.0]] * 5)
    bent = [[1.0, 0.0], [3.0, 0.0]]  # a kink in the middle: slopes 1 and 3, together 2
    none, lost = [[0.0, 0.0]] * 2, [[np.nan, 0.0], [1.0, 0.0]]
    level = [[3.0, 4.0]] * 2  # along (1, -1): -1, of a gradient of length 5
    gradients = np.array([bent, bent, none, lost, level]).transpose(1, 0, 2)
    slopes = np.array([2.0, 2.5, 4.0, 1.0, -0.5])
    noises = np.array([0.0, 0.2, 0.0, 0.0, 0.0])
    found = disagreement(slopes, noises, gradients, directions)
    np.testing.assert_allclose(found, [0, 0.3 / 2.5, 1, np.inf, 0.5 / 5], rtol=1e-12)


def test_a_probability_that_rounds_to_one_is_saturated_though_its_gradient_is_not_zero():
    linear = keras.Sequential([keras.Input((6, 6, 1)), layers.Flatten(), layers.Dense(K)])
    kernel = np.zeros((36, K))
    kernel[:, 1] = 1 / 36  # the rival's logit moves, by e^-20 of it the loss
    for bias, verdict in ((20, "warn"), (10, "pass")):
        linear.layers[-1].set_weights([kernel, np.array([bias, 0, -9, -10])])
        found = check(linear, "M9", x=GREY, y=ZEROS)
        assert (found.verdict, found.value) == (verdict, float(verdict == "warn"))
        assert found.details["exactly_zero"]["cross_entropy_clean"] == 0
        assert found.details["dlr_clean"] == 0


def test_gradients_that_are_not_finite_are_found():
    broken = OnMean(lambda t: 1 + ops.sqrt(0 * t))
    found = check(broken, "M9", x=GREY, y=ZEROS)
    assert (found.verdict, found.details["not_finite"]) == ("fail", 1.0)
    assert "NaN" in found.text


class Noisy(layers.Layer):
    """Noise at inference, from its own seeds."""

    def __init__(self):
        super().__init__()
        self.seeds = keras.random.SeedGenerator(3)

    def call(self, x):
        return x + 0.05 * keras.random.normal(ops.shape(x), seed=self.seeds)


def test_a_random_model_is_found_and_left_as_it_was(result):
    noisy = trained(last=[Noisy()])
    noisy(X[:1])
    before = snapshot(noisy.variables)
    checks = check(noisy, "M8", "M10")
    assert [c.verdict for c in checks] == ["not run", "fail"]
    assert "random" in checks[0].text and 0.001 < checks[1].value < 1
    assert checks[1].details["passes"] == 5 and checks[1].details["eot"] == 1
    assert_same(before, snapshot(noisy.variables))
    averaged = changed(result, attacks=[{"name": "apgd-ce", "eot": 20}])
    found = check(noisy, "M10", result=averaged)
    assert (found.verdict, found.details["eot"]) == ("warn", 20) and "20" in found.text


def test_the_distance_of_repeated_answers_is_that_of_directions():
    calls = []

    def undecided(x):
        calls.append(len(x))
        return np.tile([[3.0, 4.0]] if len(calls) % 2 else [[8.0, 6.0]], (len(x), 1))

    found = check(undecided, "M10", y=Y % 2)
    assert found.verdict == "fail" and found.value == pytest.approx(np.hypot(0.2, 0.2))
    ones = int((Y % 2 == 1).sum())
    assert sorted(set(found.details["correct"])) == sorted({ones, N - ones})
    # Scaling alone is no randomness.
    calls = [0]
    steady = check(lambda x: np.tile([[3.0, 4.0]], (len(x), 1)) * (calls.append(0) or len(calls)),
                   "M10", y=Y % 2)  # fmt: skip
    assert steady.verdict == "pass" and steady.value < 1e-9


class Unwired(keras.Model):
    """BatchNorm that is never told of the mode."""

    def __init__(self, of):
        super().__init__()
        self.of = of

    def call(self, x, training=None):
        return self.of(x, training=False)


def test_a_mode_that_does_not_arrive_is_found(model):
    found = check(Unwired(model), "M11")
    assert (found.verdict, found.value) == ("fail", 0.0) and "batch_norm" in found.text
    weights = model.get_weights()
    trains = ops.convert_to_numpy(model(ops.convert_to_tensor(X), training=True))
    model.set_weights(weights)
    found = check(model, "M11")
    assert found.verdict == "pass"
    assert found.value == pytest.approx(np.abs(trains - logits(model, X)).max(), rel=1e-4)
    assert check(OnMean(lambda t: 1 - t), "M11", x=GREY, y=ZEROS).verdict == "not run"
    for layer in model.layers:  # a frozen BatchNorm has one mode
        layer.trainable = False
    try:
        assert check(model, "M11").verdict == "not run"
    finally:
        for layer in model.layers:
            layer.trainable = True


class Squashed(Unwired):
    def call(self, x, training=None):
        return ops.softmax(self.of(x, training=training))


def test_probabilities_are_found(model):
    assert check(Squashed(model), "A-probabilities").verdict == "fail"
    served = Squashed(model)
    found = check(lambda x: logits(served, x), "A-probabilities")
    assert found.verdict == "warn" and found.value < 1e-5
    found = check(model, "A-probabilities")
    assert found.verdict == "pass"
    assert found.value == pytest.approx(np.abs(logits(model, X).sum(1) - 1).max(), rel=1e-4)
    # They sum to one, but some are negative.
    shifted = check(lambda x: np.tile([[2.0, -1.0]], (len(x), 1)), "A-probabilities", y=Y % 2)
    assert shifted.verdict == "pass"


@pytest.mark.parametrize(("count", "verdict"), [(2, "warn"), (3, "warn"), (4, "pass")])
def test_few_classes_are_told(count, verdict):
    found = check(lambda x: np.eye(count)[np.zeros(len(x), int)] * 5, "A-classes", y=Y * 0)
    assert (found.verdict, found.value) == (verdict, count)


# Attacks that go astray -------------------------------------------------------------------------


def test_a_gradient_that_points_away_makes_one_step_better_than_many():
    # Falls at first and again from 0.08 on; between is a hill that small steps do not cross.
    hill = OnMean(lambda t: 1 - 5 * t + 80 * ops.relu(t - 0.01) - 800 * ops.relu(t - 0.08))
    found = check(hill, "M1", x=GREY, y=ZEROS, epsilon=0.1)
    assert found.verdict == "fail" and found.value > 0.9
    assert found.details["fgsm"] == 0


def test_steps_that_jump_over_what_they_seek_are_found():
    # Broken only where the mean has moved by 0.035 to 0.065 to either side.
    shell = OnMean(lambda t: 60 * ops.abs(ops.abs(t) - 0.05) - 0.9)
    radius, silent = check(shell, "M4", "M15", x=GREY, y=ZEROS, epsilon=0.1)
    curve = radius.details["accuracy"]
    assert radius.verdict == "fail" and radius.value == pytest.approx(max(np.diff(curve)))
    assert curve[0] == 1 and min(curve) < 0.1 and radius.details["zero_at"] in (None, 0.05, 0.1)
    last = ke.evaluate_attack(shell, ke.PGD(0.1, steps=8), GREY, ZEROS).robust_accuracy
    count = silent.details["count"]
    assert silent.value == count / N == pytest.approx(last - curve[3])
    assert silent.verdict == ("warn" if count else "pass") and count > 0


def test_a_loss_that_falls_is_found():
    waves = OnMean(lambda t: 3 + ops.sin(400 * t))
    found = check(waves, "M16", x=GREY, y=ZEROS)
    assert found.verdict == "fail" and 0.05 < found.value < 1


def test_random_points_are_of_the_ball_and_of_its_rim():
    stream = np.random.default_rng(0)
    for norm in ("linf", "l2"):
        inner, outer = (
            np.array([_point(stream, (2, 2, 1), norm, outermost) for _ in range(400)])
            for outermost in (False, True)
        )
        if norm == "linf":
            assert set(np.unique(outer)) == {-1.0, 1.0} and abs(outer.mean()) < 0.1
            assert np.abs(inner).max() <= 1 and inner.std() == pytest.approx(3**-0.5, abs=0.03)
        else:
            np.testing.assert_allclose(np.sqrt((outer**2).sum((1, 2, 3))), 1)
            # Uniform in the volume: half of the points are beyond this radius.
            lengths = np.sqrt((inner**2).sum((1, 2, 3)))
            assert lengths.max() <= 1 and (lengths > 0.5**0.25).mean() == pytest.approx(
                0.5, abs=0.1
            )


def test_the_l2_ball_that_reaches_everything(model):
    found = check(model, "M3", norm="l2", epsilon=0.3)
    assert (found.verdict, found.value, found.details["epsilon"]) == ("pass", 0.0, 6.0)
    # One class for every image: nothing can break it.
    constant = check(OnMean(lambda t: 1 + 0 * t), "M3", x=GREY, y=ZEROS)
    assert (constant.verdict, constant.value, constant.details["epsilon"]) == ("fail", 1.0, 1.0)


def test_an_unbounded_attack_may_need_the_dlr_loss():
    saturated = OnMean(lambda t: 1e4 * (0.3 - t))
    assert check(saturated, "M3", x=GREY, y=ZEROS).value == 0


def test_what_any_pgd_breaks_anywhere_is_broken():
    constant = OnMean(lambda t: 1 + 0 * t)
    bench = Bench(constant, GREY, ZEROS, EPS, "linf", None, (), None, None, 0, 256, SMALL)
    asked = []

    def only(index):
        return np.arange(N) == index

    def run(attack, which, restart):
        asked.append((attack.steps, len(which), restart))
        return SimpleNamespace(right=which != 2, ever_wrong=which == 3 + restart)

    bench.__dict__["pgd"] = SimpleNamespace(right=~only(0), ever_wrong=only(0) | only(5))
    bench.__dict__["dlr"] = SimpleNamespace(ever_wrong=only(1))
    bench.run = run
    assert np.flatnonzero(~bench.white_box).tolist() == [0, 1, 3, 4, 5]
    assert np.flatnonzero(~bench.strong[0]).tolist() == [0, 2]
    assert asked == [(12, N - 1, 0), (12, N - 2, 1)]


def test_a_single_example_warns():
    assert [graded(k / 200, 0.002, 200) for k in range(3)] == ["pass", "warn", "fail"]
    assert [graded(k / 1000, 0.002, 1000) for k in (2, 3)] == ["pass", "fail"]


def test_a_natural_model_that_survives_is_found(model, by_pgd):
    found = check(model, "M20", natural=model)
    left = by_pgd["cross_entropy"].robust & by_pgd["dlr"].robust
    assert found.verdict == "fail" and 0 < found.value <= left.mean()
    assert found.value == pytest.approx(left.mean(), abs=2 / N)
    assert found.details["clean"] == right(model, X).mean()


# Results ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spoil", "key", "count"),
    [
        (lambda a: a + np.float32(0.02), "outside_ball", N),
        (lambda a: np.where(np.arange(N)[:, None, None, None] < 3, np.nan, a), "not_finite", 3),
        (lambda a: a - 2 * a.min() - np.float32(0.1), "outside_box", None),
        (lambda a: a.astype("float64"), "dtype", "float64"),
        (lambda a: a[:, :5], "shape", [N, 5, 6, 1]),
    ],
    ids=["ball", "nan", "box", "dtype", "shape"],
)
def test_infeasible_images_are_found(model, result, spoil, key, count):
    good = check(model, "M12", result=result)
    assert good.verdict == "pass" and good.value == pytest.approx(EPS, abs=1e-6)
    x_adv = spoil(result.x_adv).astype("float64" if key == "dtype" else "float32")
    if key == "outside_ball":
        x_adv = (X + np.float32(EPS + 0.02)).astype("float32")
    found = check(model, "M12", result=changed(result, x_adv=x_adv))
    assert found.verdict == "fail"
    if count is None:
        assert found.details[key] == ((x_adv < 0) | (x_adv > 1)).any(axis=(1, 2, 3)).sum() > 0
    else:
        assert found.details[key] == count
    if key == "outside_ball":
        assert found.value == pytest.approx(EPS + 0.02, abs=1e-6)


def test_the_l2_norm_is_checked_as_such(model, result):
    x = 0.5 + 0 * X
    for length, verdict in ((0.999, "pass"), (1.001, "fail")):
        adversarial = x + np.float32(length * EPS / 6)
        spoilt = changed(result, x_adv=adversarial)
        found = check(model, "M12", x=x, norm="l2", result=spoilt)
        assert found.verdict == verdict and found.value == pytest.approx(length * EPS, rel=1e-4)


def test_images_that_live_off_float_precision_are_found():
    x = np.full((N, 6, 6, 1), 128 / 255, "float32")
    edge = OnMean(lambda t: 1 - 1000 * (t + 0.5 - 128 / 255))
    nobody = np.zeros(N, bool)
    for share, verdict in ((0.5, "fail"), (0.0, "pass")):
        by = np.where(np.arange(N) < share * N, 0.0015, 0.02)[:, None, None, None]
        found = AttackResult(~nobody, nobody, (x + by).astype("float32"), 0.02)
        found = check(edge, "M13", x=x, y=ZEROS, result=found)
        assert (found.verdict, found.value) == (verdict, share)
        assert found.details["success"] == 1.0


def test_averages_instead_of_the_worst_case_are_found(model, result):
    assert check(model, "M14", result=result).verdict == "pass"
    first, second = np.ones(N, bool), np.ones(N, bool)
    first[:10], second[5:20] = False, False
    correct = np.ones(N, bool)
    entries = [{"name": "a", "robust": first}, {"name": "b", "robust": second}]
    for robust, verdict in ((second, "fail"), (first & second, "pass")):
        merged = SimpleNamespace(correct=correct, robust=robust, x_adv=X, attacks=entries)
        found = check(model, "M14", result=merged)
        assert found.verdict == verdict
        assert found.value == pytest.approx(robust.mean() - 20 / N)
        assert found.details["smallest_average"] == pytest.approx(25 / N)
    lost = [{**entry, "broken": entry["broken"] + 1} for entry in result.attacks]
    found = check(model, "M14", result=changed(result, attacks=lost))
    assert found.verdict == "fail" and found.value == pytest.approx(2 / N)
    assert check(model, "M14", result=changed(result, attacks=[])).verdict == "not run"


def test_examples_that_fool_nobody_else_are_a_hint(model, sibling, result):
    broken = result.correct & ~result.robust
    fools = ~right(sibling, result.x_adv)[broken & right(sibling, X)]
    found = check(model, "M17", result=result, siblings=[sibling])
    assert found.verdict == "pass" and found.value == pytest.approx(fools.mean()) and fools.any()
    unmoved = changed(result, x_adv=X)
    found = check(model, "M17", result=unmoved, siblings=[sibling])
    assert (found.verdict, found.value) == ("warn", 0.0) and "no proof" in found.text
    stranger = [lambda x: np.eye(5)[np.full(len(x), 4)]]  # never right: no witness
    assert check(model, "M17", result=result, siblings=stranger).verdict == "not run"


def test_wrong_accounts_are_found(model, result):
    assert check(model, "M18", result=result).value == 0
    wrong = int((~result.correct).sum())
    assert wrong >= 2

    def counted(**fields):
        found = check(model, "M18", result=changed(result, **fields))
        assert found.verdict == "fail"
        return found

    share = result.robust.sum() / result.correct.sum()
    found = counted(robust_accuracy=share)
    assert found.value == max(1, round((share - result.robust_accuracy) * N))
    assert found.details["robust_accuracy"]["expected"] == result.robust_accuracy
    robust = result.robust | ~result.correct
    found = counted(robust=robust, robust_accuracy=robust.mean())
    assert found.details["wrong_but_robust"] == wrong
    kept = result.correct  # the wrong ones were left out
    found = counted(correct=result.correct[kept], robust=result.robust[kept])
    assert "where there are 40" in found.text and found.value >= wrong
    # Counted as broken, but the model is right at the images.
    broken = int((result.correct & ~result.robust).sum())
    assert counted(x_adv=X).details["adversarial_contradicted"] == broken
    assert counted(correct=~result.correct).details["clean_contradicted"] == N


def test_an_attack_below_the_certificate_is_found(model, result):
    accuracy = result.robust_accuracy
    for certified, verdict in ((accuracy + 0.01, "fail"), (accuracy, "pass"), (0.0, "pass")):
        found = check(model, "M19", result=result, certified=certified)
        assert found.verdict == verdict and found.value == pytest.approx(accuracy - certified)
    each = np.zeros(N, bool)
    each[np.flatnonzero(~result.robust)[0]] = True  # few, but not among the survivors
    found = check(model, "M19", result=result, certified=each)
    assert (found.verdict, found.details["contradicted"]) == ("fail", 1)
    gradients, alone = check(model, "M2", "M19", certified=0.0)  # without a result
    assert alone.value == pytest.approx(gradients.details["white_box"])


def test_square_that_finds_much_is_told(model, result):
    def entries(*accuracies):
        names = ("apgd-ce", "square", "apgd-t")
        return [{"name": n, "robust_accuracy": a} for n, a in zip(names, accuracies, strict=False)]

    for accuracies, drop in (((0.5, 0.48, 0.2), 0.02), ((0.5, 0.498, 0.2), 0.002), ((0.5, 0.5), 0)):
        found = check(model, "A-square", result=changed(result, attacks=entries(*accuracies)))
        assert found.value == pytest.approx(drop)
        assert found.verdict == ("warn" if drop == 0.02 else "pass")
    alone = changed(result, attacks=entries(0.5, 0.4)[1:])
    assert check(model, "A-square", result=alone).verdict == "not run"


# What cannot be run -----------------------------------------------------------------------------


def test_a_function_is_checked_as_far_as_it_can_be(model, result):
    def served(x):  # of one shape, or JAX would compile each
        return logits(model, padded(x, N))[: len(x)]

    checks = run_checks(served, X, Y, EPS, result=result, budget=SMALL)
    verdicts = {c.id: c.verdict for c in checks}
    asked = {"M7", "M10", "M12", "M13", "M14", "M18", "A-probabilities", "A-square", "A-classes"}
    assert {id for id, v in verdicts.items() if v != "not run"} == asked
    assert {verdicts[id] for id in asked} == {"pass"}
    reasons = {c.id: c.text for c in checks if c.id in BY_GRADIENT and c.id != "M7"}
    assert all("needs gradients" in text for text in reasons.values())
    # Points are tried on what the evaluation calls robust; a sure way to break some of it:
    unbroken = changed(result, robust=result.correct)
    found = check(served, "M7", result=unbroken, epsilon=0.3)
    assert found.verdict == "fail" and found.details["tried_on"] == result.correct.sum()


def test_what_is_missing_is_said(model):
    checks = check(model, "M12", "M13", "M14", "M17", "M18", "M19", "M20", "A-square")
    assert {c.verdict for c in checks} == {"not run"} and all(c.value is None for c in checks)
    assert "siblings=" in checks[3].text and "certified=" in checks[5].text
    nothing = check(model, "M1", y=(logits(model, X).argmax(1) + 1) % K)
    assert nothing.verdict == "not run" and "correctly" in nothing.text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epsilon": 0}, "epsilon .*Received: 0"),
        ({"norm": "l1"}, "unknown norm. Received: 'l1'"),
        ({"only": ["M21"]}, "unknown check. Received: 'M21'"),
        ({"siblings": "model"}, "siblings must be a list"),
        ({"result": 0.3}, "result is not that of an evaluation. Received: float without correct"),
        ({"certified": 1.5}, r"certified .*Received: 1.5. Expected a number in \[0, 1\]"),
        ({"certified": [True]}, "certified .*40 of true and false"),
        ({"budget": 3}, "budget must be a Budget. Received: int"),
        ({"x": X[0]}, "x must be images"),
        ({"x": 255 * X}, "x: .*Divide by 255"),
        ({"y": Y + 9}, "y: .*below the number of classes"),
        ({"batch_size": 0}, "batch_size must be a whole number"),
    ],
)
def test_bad_input_is_said_in_one_line(model, change, message):
    arguments = {"x": X, "y": Y, "epsilon": EPS, "only": ["M10"], **change}
    with pytest.raises(ke.UserError, match=message) as caught:
        run_checks(model, **arguments)
    assert "\n" not in str(caught.value)
    with pytest.raises(ke.UserError, match="steps must be a whole number >= 1"):
        Budget(steps=0)
