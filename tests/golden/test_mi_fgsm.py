"""MI-FGSM: every step against a NumPy loop, closed forms, training."""

import keras
import numpy as np
import pytest

import keras_emr as ke
from keras_emr import backend
from keras_emr.attacks import ATTACKS
from keras_emr.attacks.mi_fgsm import MIFGSM
from tests.builders import assert_same, images, snapshot
from tests.golden import reference as ref
from tests.golden.test_attacks import D, Given, Linear, Random, norms, run
from tests.golden.test_search_attacks import Wavy, float64, project

__all__ = ["float64"]


@pytest.mark.parametrize(
    "norm, epsilon, options",
    [
        ("linf", 0.3, {}),
        ("linf", 0.3, dict(mu=0.5, step_size=0.07, objective="margin")),
        ("l2", 0.5, {}),
        ("l2", 0.5, dict(mu=0.0, step_size=0.3, start="uniform")),
    ],
)
def test_every_step(float64, norm, epsilon, options):
    problem, rng, steps = Wavy(), np.random.default_rng(1), 8
    attack = MIFGSM(epsilon, norm, steps=steps, **options)
    name = options.get("objective", "cross_entropy")
    alpha, mu = options.get("step_size", epsilon / steps), options.get("mu", 1.0)
    x = problem.x.reshape(-1, D)
    v, m = x.copy(), np.zeros_like(x)
    sampler = None
    if "start" in options:
        direction, radius = rng.normal(size=problem.x.shape), rng.uniform(size=problem.n)
        sampler = Given([radius], [direction])
        u = direction.reshape(-1, D)
        v = np.clip(x + epsilon * (radius / norms(u, "l2"))[:, None] * u, 0, 1)
    objective, tensor = problem.objective(name), ref.tensor(problem.x)
    state = attack.begin(objective, tensor, attack.draw(tensor, sampler))
    step = backend.compiled(lambda state: attack.step(objective, tensor, state), [])
    for _ in range(steps):
        np.testing.assert_allclose(ref.numpy(state[0]).reshape(-1, D), v, atol=1e-6)
        for i in range(problem.n):
            g = problem.look(name, i, v[i])[1]
            m[i] = mu * m[i] + g / np.abs(g).sum()
            way = np.sign(m[i]) if norm == "linf" else m[i] / np.sqrt((m[i] ** 2).sum())
            v[i] = project(v[i] + alpha * way, x[i], epsilon, norm)
        state = step(state)
        np.testing.assert_allclose(ref.numpy(state[1]).reshape(-1, D), m, atol=1e-6)
    np.testing.assert_allclose(ref.numpy(attack.result(state)).reshape(-1, D), v, atol=1e-6)


def test_momentum_passes_a_flat_place(float64):
    """Where the gradient is zero, the image moves on as the momentum says; without, it stays."""
    problem = Linear(gate=np.array([1.0, 1, 1, 1, 0, 0]))
    objective, x = problem.objective(), ref.tensor(problem.x)
    push = problem.rng.normal(size=problem.x.shape)
    for norm in ("linf", "l2"):
        for mu in (0.0, 0.5):
            attack = MIFGSM(0.2, norm, steps=4, mu=mu)
            step = backend.compiled(lambda state, a=attack: a.step(objective, x, state), [])
            moved, momentum = step((x, ref.tensor(push)))
            moved, momentum = ref.numpy(moved), ref.numpy(momentum)
            np.testing.assert_allclose(momentum[4:], mu * push[4:], atol=1e-12)
            way = np.sign(push) if norm == "linf" else push / norms(push, "l2")[:, None, None, None]
            want = np.clip(problem.x + (mu > 0) * 0.05 * way, 0, 1)
            np.testing.assert_allclose(moved[4:], want[4:], atol=1e-6)


def test_tiny_gradients_count_as_much_as_large_ones():
    """The momentum is of length one after the first step, down to 1e-20 in float32."""
    problem = Linear(gate=np.array([1.0, 1e-5, 1e-10, 1e-15, 1e-20, 0.0]))
    objective, x = problem.objective(dtype="float32"), ref.tensor(problem.x, "float32")
    attack = MIFGSM(0.2)
    _, momentum = attack.step(objective, x, attack.begin(objective, x, ()))
    np.testing.assert_allclose(norms(ref.numpy(momentum), "l1"), [1, 1, 1, 1, 1, 0], rtol=1e-5)


@pytest.mark.parametrize("epsilon", [0.3])
def test_worst_case_of_two_classes(epsilon):
    problem = Linear(k=2, low=0.4, high=0.6)
    w = (problem.w.T[1 - problem.y] - problem.w.T[problem.y]).reshape(problem.x.shape)
    best = problem.x + epsilon * np.sign(w)
    x_adv = run(MIFGSM(epsilon), problem, dtype="float32")
    np.testing.assert_allclose(x_adv, best, atol=1e-6)
    best = problem.x + epsilon * w / norms(w, "l2")[:, None, None, None]
    x_adv = run(MIFGSM(epsilon, "l2"), problem, dtype="float32")
    np.testing.assert_allclose(x_adv, best, atol=1e-6)


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("start", ["none", "gaussian"])
def test_results_are_feasible(norm, start):
    problem = Linear(gate=np.array([1.0, 1, 1, 1, 0, 0]))
    problem.x = np.round(problem.x * 4) / 4
    for epsilon in (0.0, 5.0):
        attack = MIFGSM(epsilon, norm, steps=3, start=start, restarts=2)
        x_adv = run(attack, problem, Random("float32"), dtype="float32")
        assert np.isfinite(x_adv).all() and x_adv.min() >= 0 and x_adv.max() <= 1
        size = norms(x_adv - problem.x, norm)
        assert (size <= epsilon + 1e-6).all() and (size[:4] >= 0.5 * min(epsilon, 0.02)).all()


def test_training_and_evaluation():
    x, y = images(32)
    attack = MIFGSM(0.3, steps=2)
    keras.utils.set_random_seed(0)
    layers = [keras.Input(x.shape[1:]), keras.layers.Flatten(), keras.layers.Dense(3)]
    classifier = ke.RobustClassifier(keras.Sequential(layers), defense="at", attack=attack)
    classifier.compile(optimizer=keras.optimizers.Adam(1e-2))
    before = snapshot(classifier.model.trainable_variables)
    history = classifier.fit(x, y, batch_size=16, epochs=1, verbose=0).history
    assert np.isfinite(history["loss"]).all()
    with pytest.raises(AssertionError):
        assert_same(before, snapshot(classifier.model.trainable_variables))
    labels = keras.ops.convert_to_numpy(classifier.model(x, training=False)).argmax(1)
    result = ke.evaluate_attack(classifier.model, attack, x, labels, batch_size=16)
    assert result.correct.all() and result.robust.sum() < 32
    assert 0 < result.max_perturbation <= 0.3 + 1e-6


@pytest.mark.parametrize(
    "make, field",
    [
        (lambda: MIFGSM(0.1, mu=-1.0), "mu"),
        (lambda: MIFGSM(0.1, step_size="long"), "step_size"),
        (lambda: MIFGSM(0.1, steps=0), "steps"),
        (lambda: MIFGSM(0.1, norm="l1"), "norm"),
        (lambda: MIFGSM(None), "epsilon"),
    ],
)
def test_bad_options_are_refused_in_one_line(make, field):
    with pytest.raises(ke.UserError) as caught:
        make()
    assert field in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "attack", [MIFGSM(0.1), MIFGSM(0.2, "l2", 7, 0.03, 0.9, "uniform", 3, "margin")]
)
def test_options_survive_saving(attack):
    loaded = keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(attack))
    assert type(loaded) is MIFGSM and repr(loaded) == repr(attack)
    assert ATTACKS.get("mi-fgsm") is MIFGSM
    assert attack.describe()["step_size"] == attack.alpha
    assert len(attack.get_config()) == 8
