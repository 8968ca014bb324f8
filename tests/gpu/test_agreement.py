"""A GPU gives the numbers of the CPU: ``tests/parity/worker.py`` on both, in float32.

Losses, EMR, input gradients, attacks' steps, one optimizer step of every defense with EMR, one
joint step of the LSTM maximizer. Without TF32, whose 10 bits are no float32. Tolerances: relative
to the largest entry of each array.
"""

import os
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest

from tests.parity.test_parity import write_given
from tests.processes import environment

pytestmark = pytest.mark.gpu
BACKEND = keras.backend.backend()
EXACT = {"NVIDIA_TF32_OVERRIDE": "0", "JAX_DEFAULT_MATMUL_PRECISION": "highest"}
ON_CPU = {"CUDA_VISIBLE_DEVICES": "-1", "JAX_PLATFORMS": "cpu"}
# Of what is compared to 1e-4, by the first word of its name. Adam, projections onto hyperplanes and
# small differences magnify rounding; a sign flips where a gradient is almost zero.
LOOSER = {"search": 1e-3, "emr_difference": 1e-3, "extras": 1e-3}
SIGNS = ("sign", "learned_sign")


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("agreement")
    write_given(folder / "given.npz")
    results = []
    for name, more in (("gpu", {}), ("cpu", ON_CPU)):
        target = folder / f"{name}.npz"
        worker = Path(__file__).parents[1] / "parity" / "worker.py"
        path = os.pathsep.join([str(worker.parents[2]), os.environ.get("PYTHONPATH", "")])
        # No XLA_FLAGS: those of the other tests are for one version's CPU.
        given = {"JAX_ENABLE_X64": "0", "XLA_FLAGS": "", "PYTHONPATH": path, **EXACT, **more}
        done = subprocess.run(
            [sys.executable, str(worker), str(folder / "given.npz"), str(target)],
            env=environment(BACKEND, **given),
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        results.append(dict(np.load(target)))
        assert str(results[-1].pop("device")) == name
        assert str(results[-1].pop("backend")) == BACKEND
    return results


def groups(results):
    return sorted({name.split("/")[0] for name in results})


def test_everything_is_compared(found):
    on_gpu, on_cpu = found
    assert set(on_gpu) == set(on_cpu)
    expected = {"loss", "emr", "gradient", "step", "step_loss", "joint", "learned", "sign"}
    assert expected <= set(groups(on_gpu))
    for defense in ("at", "trades", "mart"):
        assert f"loss/{defense}" in on_gpu and f"step/{defense}/0" in on_gpu


def test_numbers_agree(found):
    wrong = []
    for name, reference in found[1].items():
        group = name.split("/")[0]
        if group in SIGNS:
            continue
        difference, scale = np.abs(found[0][name] - reference).max(), np.abs(reference).max()
        assert scale > 1e-6, f"{name} is all zeros"
        allowed = LOOSER.get(group, 1e-4) * scale
        if "kl" in name and group in ("learned", "meta_value"):  # as in tests/parity
            allowed = 5e-4
        if not difference <= allowed:
            wrong.append(f"{name}: {difference / scale:.1e}")
    assert not wrong


def test_signs_agree_in_999_of_1000_entries(found):
    for name, reference in found[1].items():
        if name.split("/")[0] in SIGNS:
            equal = np.isclose(found[0][name], reference, rtol=0, atol=1e-6).mean()
            assert equal >= 0.999, f"{name}: {equal:.4%}"
