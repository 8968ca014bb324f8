"""The difference of logits ratio, and targeted APGD that climbs it, against NumPy."""

import keras
import numpy as np
import pytest
from keras import ops

from keras_emr import losses
from keras_emr.attacks.apgd import State
from keras_emr.attacks.apgd_targeted import APGDTargeted
from keras_emr.evaluation.attack_run import AttackRun
from keras_emr.sampling import ExampleSampler
from tests.builders import images, network
from tests.golden import reference as ref
from tests.golden.test_attacks import SHAPE, D
from tests.golden.test_search_attacks import Wavy, auto_pgd, float64, sphere_noise  # noqa: F401


def dlr(y, z, target=None):
    """One example."""
    others = np.delete(z, y)
    numerator = -(z[y] - (others.max() if target is None else z[target]))
    ordered = np.sort(z)[::-1]
    if len(z) < (3 if target is None else 4):
        return numerator
    low = ordered[2] if target is None else (ordered[2] + ordered[3]) / 2
    return numerator / (ordered[0] - low + 1e-12)


def ours(y, z, target=None):
    target = None if target is None else ref.tensor(target, "int32")
    return ref.numpy(losses.dlr_loss(ref.tensor(y, "int32"), ref.tensor(z), target))


@pytest.mark.parametrize("k", [2, 3, 4, 10])
@pytest.mark.parametrize("targeted", [False, True])
def test_values(k, targeted):
    rng = np.random.default_rng(k)
    z, y = 5 * rng.normal(size=(60, k)), rng.integers(0, k, 60)
    target = (y + rng.integers(1, k, 60)) % k if targeted else None
    want = [dlr(y[i], z[i], target[i] if targeted else None) for i in range(60)]
    np.testing.assert_allclose(ours(y, z, target), want, rtol=1e-12)
    enough = k >= (4 if targeted else 3)
    scaled = ours(y, 100 * z, target)
    np.testing.assert_allclose(scaled, np.array(want) * (1 if enough else 100), rtol=1e-9)


def test_worked_values():
    z = np.array([[3.0, 1.0, 0.0, -1.0]])
    assert ours([0], z)[0] == pytest.approx(-2 / 3)  # right: minus the lead over z_1 - z_3
    assert ours([1], z)[0] == pytest.approx(2 / 3)
    assert ours([2], z)[0] == pytest.approx(1.0)  # third: exactly one, whatever the logits
    assert ours([3], z)[0] == pytest.approx(4 / 3)  # not bounded
    assert ours([0], z, [1])[0] == pytest.approx(-2 / 3.5)
    assert ours([0], z, [3])[0] == pytest.approx(-4 / 3.5)


def test_gradients():
    rng = np.random.default_rng(1)
    z, y = rng.normal(size=(20, 5)), rng.integers(0, 5, 20)
    target = (y + 1) % 5
    for to in (None, target):
        tensor = None if to is None else ref.tensor(to, "int32")
        (got,) = ref.gradients(
            lambda logits, t=tensor: ops.sum(losses.dlr_loss(ref.tensor(y, "int32"), logits, t)), z
        )
        want = ref.finite_difference(lambda v, t=to: ours(y, v, t).sum(), z)
        np.testing.assert_allclose(got, want, atol=1e-6)
    third = np.argsort(-z, axis=1)[:, 2]
    (flat,) = ref.gradients(
        lambda logits: ops.sum(losses.dlr_loss(ref.tensor(third, "int32"), logits)), z
    )
    np.testing.assert_allclose(flat, 0, atol=1e-9)


class Ratio(Wavy):
    """The targeted DLR of ``Wavy``, one example at a time."""

    def towards(self, i, v, target):
        phase, y = v @ self.a + self.bias, self.y[i]
        z = np.sin(phase) @ self.b + self.lead[i] * np.eye(self.k)[y]
        order = np.argsort(-z)
        e = np.eye(self.k)
        low = (z[order[2]] + z[order[3]]) / 2
        bottom = z[order[0]] - low + 1e-12
        top, dtop = z[target] - z[y], e[target] - e[y]
        dbottom = e[order[0]] - (e[order[2]] + e[order[3]]) / 2
        dz = (dtop * bottom - top * dbottom) / bottom**2
        return top / bottom, self.a @ (np.cos(phase) * (self.b @ dz)), z.argmax()


@pytest.mark.parametrize("norm, epsilon", [("linf", 0.3), ("l2", 0.5)])
@pytest.mark.parametrize("rank", [0, 2])
def test_apgd_t_every_step(float64, norm, epsilon, rank):  # noqa: F811
    problem, n = Ratio(frequency=3.0, k=5), 20
    x = problem.x.reshape(problem.n, D)
    sampler, begin = sphere_noise(problem, norm, np.random.default_rng(3))
    sampler.restart = rank
    clean = np.sin(x @ problem.a + problem.bias) @ problem.b
    clean += problem.lead[:, None] * np.eye(problem.k)[problem.y]
    target = np.argsort(-clean, axis=1)[:, rank + 1]
    runs = [
        auto_pgd(
            lambda v, i=i: problem.towards(i, v, target[i]),
            x[i], begin(epsilon)[i], n, epsilon, norm, 0.75,
        )[0]
        for i in range(problem.n)
    ]  # fmt: skip
    attack = APGDTargeted(epsilon, norm, steps=n, targets=3)
    objective, clean_images = problem.objective("dlr"), ref.tensor(problem.x)
    state = attack.begin(objective, clean_images, attack.draw(clean_images, sampler, 5))
    np.testing.assert_array_equal(ref.numpy(state[0]), target)
    compared = 0
    for t in range(n):
        state = attack.step(objective, clean_images, state)
        # Beyond 1 the value may grow without bound and rounding with it.
        sure = np.array([run[t]["sure"] and run[t]["value"] < 1 for run in runs])
        compared += sure.sum()
        for key in ("x", "best"):
            got = ref.numpy(getattr(State(*state[1]), key)).reshape(-1, D)[sure]
            want = np.array([run[t][key] for run, keep in zip(runs, sure, strict=True) if keep])
            np.testing.assert_allclose(got, want.reshape(got.shape), atol=1e-6)
    assert compared > 0.4 * n * problem.n
    found = ref.numpy(attack.result(state)).reshape(-1, *SHAPE)
    delta = (found - problem.x).reshape(problem.n, D)
    size = np.abs(delta).max(1) if norm == "linf" else np.sqrt((delta**2).sum(1))
    assert (size <= epsilon + 1e-9).all()


def test_each_run_has_its_target_and_every_target_its_run():
    attack = APGDTargeted(0.1, targets=9, restarts=2)
    assert [attack.runs(k) for k in (2, 4, 10, 100)] == [2, 6, 18, 18]
    x = ref.tensor(np.zeros((2, *SHAPE)))
    ranks = [
        int(ref.numpy(attack.draw(x, ExampleSampler(0, run, [0, 1]), 4)[-1])) for run in range(6)
    ]
    assert ranks == [1, 2, 3, 1, 2, 3]


@pytest.mark.skipif(keras.backend.backend() == "torch", reason="nothing is compiled there")
def test_a_new_target_compiles_nothing():
    x, y = images(8, classes=4)
    run = AttackRun(network(classes=4), APGDTargeted(0.1, steps=2), 8)
    calls = []
    logits = run.network.frozen

    def counted(**options):
        calls.append(1)
        return logits(**options)

    run.network.frozen = counted
    run.attack_batch(x, y, np.arange(8), 0, 0)
    first = len(calls)
    for target in (1, 2):
        run.attack_batch(x, y, np.arange(8), target, 0)
    assert len(calls) == first > 0
