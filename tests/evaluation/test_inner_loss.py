"""Inner losses, their cost, and loss surfaces, against closed forms."""

import keras
import numpy as np
import pytest

import keras_emr as ke
from keras_emr import backend
from keras_emr.attacks.base import Objective
from keras_emr.data.dataset import from_arrays
from keras_emr.evaluation import timing
from keras_emr.evaluation.inner_loss import InnerLossMeter, passes
from keras_emr.evaluation.loss_surface import loss_surface
from keras_emr.evaluation.maximizer_comparison import MaximizerComparison
from keras_emr.evaluation.robust_accuracy import InfeasibleAttack
from keras_emr.network import Network
from keras_emr.sampling import StreamSampler
from tests.builders import assert_same, images, network, snapshot

EPSILON = 0.05
X, Y = images(20, side=4, classes=2)
WEIGHTS = np.random.default_rng(1).normal(size=(16, 2)).astype("float32")


@pytest.fixture(scope="module")
def linear():
    """Two classes: the gradient's sign is the same everywhere."""
    model = keras.Sequential(
        [keras.Input((4, 4, 1)), keras.layers.Flatten(), keras.layers.Dense(2)]
    )
    model.layers[-1].set_weights([WEIGHTS, np.array([0.1, -0.1], "float32")])
    return model


def cross_entropy(x):
    """(N,) float64, by NumPy, of the linear model."""
    logits = x.reshape(len(x), -1).astype("float64") @ WEIGHTS + [0.1, -0.1]
    right, wrong = logits[np.arange(len(x)), Y], logits[np.arange(len(x)), 1 - Y]
    return np.logaddexp(0, wrong - right), right > wrong


def uphill():
    """The sign of every image's gradient, (N, 4, 4, 1)."""
    difference = np.sign(WEIGHTS[:, 1] - WEIGHTS[:, 0])
    return np.where(Y[:, None] == 0, difference, -difference).reshape(X.shape)


def pgd_by_hand(steps, alpha, seed):
    """Images after 0..steps steps."""
    noise = [np.random.default_rng([seed, 0, i]).uniform(-1, 1, (4, 4, 1)) for i in range(len(X))]
    low, high = np.maximum(X - EPSILON, 0), np.minimum(X + EPSILON, 1)
    found = [np.clip(X + EPSILON * np.stack(noise), 0, 1)]
    for _ in range(steps):
        found.append(np.clip(found[-1] + alpha * uphill(), low, high))
    return found


@pytest.mark.parametrize("batch_size", [20, 7])
def test_the_curve_of_pgd_is_the_closed_form(linear, batch_size):
    meter = InnerLossMeter(linear, ke.PGD(EPSILON, steps=4), batch_size)
    seen = []
    curve = meter.curve(X, Y, steps=6, seed=3, progress=lambda *a: seen.append(a))
    judged = [cross_entropy(x) for x in pgd_by_hand(6, 2.5 * EPSILON / 4, seed=3)]
    np.testing.assert_allclose(curve.loss, [loss.mean() for loss, _ in judged], rtol=2e-6)
    clean = cross_entropy(X)[1]
    robust = [(right & clean).mean() for _, right in judged]
    np.testing.assert_allclose(curve.robust_accuracy, robust, atol=1e-12)
    assert 0 < robust[-1] < robust[0] < 1  # the weights leave something to see
    assert seen[-1] == (20, 20)


def test_apgd_is_judged_by_its_best_image(linear):
    """On a linear model the first step of 2 epsilon is the best there is."""
    curve = InnerLossMeter(linear, ke.APGD(EPSILON, steps=3), 20).curve(X, Y)
    best = np.clip(X + EPSILON * uphill(), 0, 1)
    np.testing.assert_allclose(curve.loss[1:], cross_entropy(best)[0].mean(), rtol=2e-6)


def test_an_attack_outside_its_ball_is_no_result(linear):
    class TooFar(ke.PGD):
        def step(self, objective, x, state):
            return (state[0] + 0.2,)

    with pytest.raises(InfeasibleAttack):
        InnerLossMeter(linear, TooFar(EPSILON, steps=1), 20).curve(0.5 * X, Y)


@pytest.mark.parametrize(
    "attack",
    [
        ke.PGD(EPSILON, steps=3),
        ke.PGD(EPSILON, steps=2, start="odi"),
        ke.APGD(EPSILON, steps=3),
        ke.LineSearch(EPSILON, steps=2, trials=4, start="uniform"),
        ke.LearnedAttack(EPSILON, maximizer="rnn", steps=3),
        ke.LearnedAttack.named("generator-naive", EPSILON),
        ke.LearnedAttack.named("generator-multistep", EPSILON),
        ke.LearnedAttack.named("gat", EPSILON),
    ],
    ids=lambda attack: attack.name,
)
def test_passes_are_counted_right(linear, attack, monkeypatch):
    counted = {"gradients": 0, "logits": 0}
    differentiate, frozen = backend.value_and_grad, Network(linear).frozen()

    def counting(fn, x):
        counted["gradients"] += 1
        return differentiate(fn, x)

    def logits(x):
        counted["logits"] += 1
        return frozen(x)

    monkeypatch.setattr(backend, "value_and_grad", counting)
    attack = attack.with_defaults(keep="best_loss")
    if hasattr(attack, "maximizer") and not attack.maximizer.built:
        attack.maximizer.build((None, 4, 4, 1))
    x, y = keras.ops.convert_to_tensor(X[:1]), keras.ops.convert_to_tensor(Y[:1])
    # Not compiled: a compiled loop's body would be counted once.
    objective = Objective(logits, attack.objective or "cross_entropy", x, y, unroll=True)
    state = attack.begin(objective, x, attack.draw(x, StreamSampler(0), 2))
    for _ in range(attack.steps):
        state = attack.step(objective, x, state)
    assert passes(attack) == {
        "input_gradients": counted["gradients"],
        "forward_passes": counted["logits"] - counted["gradients"],
    }


def test_the_stopwatch_has_an_entry_per_step(linear):
    watch = InnerLossMeter(linear, ke.PGD(EPSILON, steps=3), 16).stopwatch(X, Y)
    seconds = watch()
    assert seconds.shape == (4,) and seconds[0] > 0 and (np.diff(seconds) > 0).all()


def test_candidates_take_turns():
    order = []

    def job(name):
        def run():
            order.append(name)
            return len(order)

        return run

    first, second = timing.in_turns([job("a"), job("b")], rounds=2, warm_up=1)
    assert order == ["a", "b"] * 3
    assert (first.tolist(), second.tolist()) == ([3, 5], [4, 6])
    assert timing.quartiles([1.0, 2.0, 3.0]) == {"median": 2.0, "low": 1.5, "high": 2.5}


def test_the_surface_of_a_linear_model(linear):
    surface = loss_surface(linear, X, Y, EPSILON, points=5, seed=4, batch_size=7)
    np.testing.assert_allclose(surface.a, EPSILON * np.array([-1, -0.5, 0, 0.5, 1]))
    np.testing.assert_array_equal(surface.a, surface.b)
    streams = [np.random.default_rng([4, 2**16, i]) for i in range(len(X))]
    r = np.stack([np.where(s.uniform(-1, 1, (4, 4, 1)) < 0, -1, 1) for s in streams])
    for i, a in enumerate(surface.a):
        for j, b in enumerate(surface.b):
            loss, _ = cross_entropy(np.clip(X + a * uphill() + b * r, 0, 1))
            assert surface.loss[i, j] == pytest.approx(loss.mean(), rel=2e-6), (i, j)


def test_an_example_s_surface_depends_on_its_index_alone(linear):
    both = loss_surface(linear, X[3:5], Y[3:5], EPSILON, points=3, index=[3, 4])
    parts = [
        loss_surface(linear, X[i : i + 1], Y[i : i + 1], EPSILON, points=3, index=[i])
        for i in (3, 4)
    ]
    np.testing.assert_allclose(both.loss, (parts[0].loss + parts[1].loss) / 2, rtol=1e-12)
    other = loss_surface(linear, X[3:5], Y[3:5], EPSILON, points=3, index=[3, 4], seed=1)
    np.testing.assert_array_equal(both.loss[:, 1], other.loss[:, 1])  # b = 0
    assert (both.loss[:, 0] != other.loss[:, 0]).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epsilon": 0}, "epsilon must be a number > 0"),
        ({"points": 4}, "points must be odd"),
        ({"points": 1}, "points must be a whole number >= 3"),
    ],
    ids=str,
)
def test_surfaces_without_a_middle_are_refused(linear, options, message):
    with pytest.raises(ke.UserError, match=message):
        loss_surface(linear, X, Y, **{"epsilon": EPSILON, **options})


def test_comparison_leaves_the_model_alone_and_tunes_pgd():
    x, y = images(40, side=6, classes=2, seed=1)
    data = from_arrays({"x_train": x, "y_train": y, "x_test": x[:12], "y_test": y[:12]})
    model = network(classes=2)  # with BatchNorm
    before = snapshot(model.variables)
    compare = MaximizerComparison(
        data,
        EPSILON,
        ("pgd", "rnn"),
        steps=2,
        more=(2,),
        batch_size=8,
        fit_epochs=1,
        rounds=1,
    )
    found = compare(model, lambda: network(classes=2))
    assert_same(before, snapshot(model.variables))

    pgd, tuned, rnn = found["methods"]
    assert [e["method"] for e in found["methods"]] == ["pgd", "pgd (tuned)", "rnn"]
    assert [[r["steps"] for r in e["runs"]] for e in found["methods"]] == [[2, 4]] * 3
    assert [e["parameters"] for e in found["methods"]] == [0, 0, 120]
    for run, default in zip(tuned["runs"], pgd["runs"], strict=True):
        tried = {t["step_size"]: t["final_loss"] for t in run["tried"]}
        factors = [1.25 if run["steps"] == 2 else 0.625, 0.1, 0.25, 0.5, 1.0]
        assert list(tried) == pytest.approx([EPSILON * f for f in factors])
        assert run["final_loss"] == max(tried.values())
        assert tried[next(iter(tried))] == default["final_loss"]
        attack = ke.PGD(EPSILON, steps=run["steps"], step_size=run["step_size"])
        again = InnerLossMeter(model, attack, 12).curve(data.x_test, data.y_test)
        assert run["loss"] == pytest.approx(again.loss.tolist(), rel=1e-5)
    assert rnn["fit"]["updates"] == 4 and len(rnn["fit"]["inner_loss"]) == 1
    assert rnn["loss"] == rnn["runs"][1]["loss"][:3]  # one run, read off twice
    assert pgd["time_relative_to_pgd"] == {"median": 1.0, "low": 1.0, "high": 1.0}
    (cost,) = found["training"]
    assert (cost["method"], cost["parameters"], cost["batches_per_epoch"]) == ("rnn", 120, 4)
    assert cost["epoch_seconds"] == pytest.approx(4 * cost["step_seconds"]["median"])


def test_unknown_methods_are_refused():
    with pytest.raises(ke.UserError, match="unknown method"):
        MaximizerComparison(None, EPSILON, ("pgdd",))
