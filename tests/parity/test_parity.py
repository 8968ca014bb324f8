"""tensorflow, jax and torch give the same numbers from the same weights, batch and noise.

Tolerances: relative to the largest entry of each array, float32 on CPU.
"""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.processes import environment

BACKENDS = ("tensorflow", "jax", "torch")
SHAPES = [(3, 3, 1, 6), (6,), (6,), (6,), (6,), (6,), (3, 3, 6, 8), (8,), (32, 5), (5,)]


def write_given(path):
    """Weights, images and noise, the same for every backend."""
    rng = np.random.default_rng(0)
    weights = [rng.normal(size=shape) * 0.4 for shape in SHAPES]
    weights[2] += 1.0  # BatchNorm gamma
    weights[5] = np.abs(weights[5]) + 0.5  # moving variance
    x = rng.uniform(size=(64, 10, 10, 1))
    noise = rng.uniform(-1, 1, size=x.shape)
    given = {f"w{i}": w.astype("float32") for i, w in enumerate(weights)}
    given |= {
        "x": x.astype("float32"),
        "x_adv": np.clip(x + 0.1 * noise, 0, 1).astype("float32"),
        "y": rng.integers(0, 5, 64).astype("int32"),
        "uniform": noise.astype("float32"),
        "normal": rng.normal(size=x.shape).astype("float32"),
        "phi": (0.5 * rng.normal(size=500)).astype("float32"),
    }
    np.savez(path, **given)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parity")
    write_given(folder / "given.npz")
    found = {}
    for backend in BACKENDS:
        target = folder / f"{backend}.npz"
        worker = Path(__file__).with_name("worker.py")
        done = subprocess.run(
            [sys.executable, str(worker), str(folder / "given.npz"), str(target)],
            env=environment(backend, JAX_ENABLE_X64="0", PYTHONPATH=str(worker.parents[2])),
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        found[backend] = dict(np.load(target))
        assert str(found[backend].pop("backend")) == backend
        assert str(found[backend].pop("device")) == "cpu"
    return found


def names(results, prefix):
    chosen = [name for name in results["tensorflow"] if name.startswith(prefix)]
    assert chosen
    return chosen


def assert_close(results, name, tolerance):
    reference = results["tensorflow"][name]
    scale = np.abs(reference).max()
    assert scale > 1e-6, f"{name} is all zeros"
    for backend in BACKENDS[1:]:
        worst = np.abs(results[backend][name] - reference).max() / scale
        assert worst <= tolerance, f"{name} on {backend}: {worst:.2e}"


@pytest.mark.parametrize("prefix", ["loss/", "emr/", "gradient/", "margins/", "step_loss/"])
def test_values_agree_to_1e_5(results, prefix):
    for name in names(results, prefix):
        assert_close(results, name, 1e-5)


def test_one_optimizer_step_agrees_to_1e_5(results):
    """BatchNorm and EMR included: no gradient may pass through a statistic just updated."""
    for name in names(results, "step/"):
        assert_close(results, name, 1e-5)


def test_three_steps_with_everything_around_them_agree(results):
    """AWP, SGD with decay and clipping, a schedule, growing epsilon, an average: to 1e-4."""
    for name in names(results, "extras/"):
        assert_close(results, name, 1e-4)


def test_finite_difference_emr_agrees_within_its_rounding(results):
    """Dividing by h = 0.01 magnifies float32 rounding a hundredfold."""
    for name in names(results, "emr_difference/"):
        assert_close(results, name, 2e-4)


def test_one_sign_step_agrees_in_999_of_1000_entries(results):
    for name in names(results, "sign/"):
        reference = results["tensorflow"][name]
        assert np.abs(reference).max() == pytest.approx(0.1, abs=1e-6)
        for backend in BACKENDS[1:]:
            equal = np.isclose(results[backend][name], reference, rtol=0, atol=1e-6).mean()
            assert equal >= 0.999, f"{name} on {backend}: {equal:.4%}"


def test_attacks_of_evaluation_agree(results):
    """To 1e-4: Adam and projections onto hyperplanes magnify rounding from step to step."""
    for name in names(results, "search/"):
        reference = results["tensorflow"][name]
        moved = np.abs(reference).max(axis=(1, 2, 3)) > 0
        assert moved.mean() > 0.5, name
        assert_close(results, name, 1e-4)


def test_learned_attacks_agree(results):
    """Images and objective, and what they teach: no sign, so nothing can flip.

    A KL divergence of 0.01 has lost two digits of float32: its images agree in absolute terms.
    """
    for prefix in ("learned/", "meta_value/", "meta_gradient/"):
        for name in names(results, prefix):
            if "kl" in name and "gradient" not in name:
                for backend in BACKENDS:
                    difference = results[backend][name] - results["tensorflow"][name]
                    assert np.abs(difference).max() < 5e-5, (name, backend)
            else:
                assert_close(results, name, 1e-5)
    images = [results["tensorflow"][name] for name in names(results, "learned/")]
    clipped = [(np.abs(delta) > 0.0999).mean() for delta in images]
    assert max(clipped) > 0.02 and min(clipped) < 0.5  # the projection takes part


def test_learned_attack_on_signs_agrees_in_999_of_1000_entries(results):
    for name in names(results, "learned_sign/"):
        reference = results["tensorflow"][name]
        for backend in BACKENDS[1:]:
            equal = np.isclose(results[backend][name], reference, rtol=0, atol=1e-6).mean()
            assert equal >= 0.999, f"{name} on {backend}: {equal:.4%}"


def test_one_joint_step_agrees_to_1e_5(results):
    """Phi and theta after one batch, by plain gradient steps."""
    for name in names(results, "joint/"):
        assert_close(results, name, 1e-5)


def test_stored_values(results):
    """One value per defense, stored: a change of any formula shows on every backend."""
    for name, value in STORED.items():
        for backend in BACKENDS:
            assert results[backend][name].mean() == pytest.approx(value, rel=1e-5), (name, backend)


STORED = {
    "loss/standard": 2.379539,
    "loss/at": 2.360843,
    "loss/trades": 2.401942,
    "loss/mart": 3.072545,
    "loss/mail-at": 3.260912,
    "loss/mail-trades": 2.416103,
    "loss/mail-mart": 6.414958,
    "emr/0": 2.746046,
    "margins/l2": -0.4274845,
    "margins/linf": -0.06712627,
    "step_loss/trades": 4.033738,
}
