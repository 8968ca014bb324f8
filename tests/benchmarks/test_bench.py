"""Training steps beside the least time of their passes: by hand, and one tiny measurement."""

import keras
import numpy as np
import pytest
from keras import layers

from keras_emr import backend
from keras_emr.benchmark import JOBS
from keras_emr.benchmark import measure as module
from keras_emr.benchmark.jobs import Job, Least
from keras_emr.benchmark.measure import measure
from keras_emr.training.cost import Forward
from tests.builders import snapshot

SHAPE = (6, 6, 1)
# Of an example: forwards 100, back to the image 100, kernels 100, of which the first layer 10.
COST = Forward(flops=100, activations=1, first_layer=10)
THERE_AND_BACK, STEP = 200, 290
TEN = 10 * THERE_AND_BACK
# name -> (inner, full, forward, penalty), FLOPs at ten attack steps
LEAST = {
    "standard": ((0, 1, 0, 0), STEP),
    "at": ((10, 1, 0, 0), TEN + STEP),
    "trades": ((10, 2, 1, 0), TEN + 2 * STEP + 100),
    "mart": ((10, 2, 0, 0), TEN + 2 * STEP),
    # The penalty: there, back, and both once more.
    "at-emr": ((10, 1, 0, 1), TEN + STEP + 400),
    "trades-emr": ((10, 2, 1, 1), TEN + 2 * STEP + 100 + 400),
    "mart-emr": ((10, 2, 0, 1), TEN + 2 * STEP + 400),
    # The maximizer's last loss needs a gradient more.
    "at-lstm": ((11, 1, 0, 0), TEN + THERE_AND_BACK + STEP),
    "trades-lstm": ((11, 2, 1, 0), TEN + THERE_AND_BACK + 2 * STEP + 100),
}


@pytest.mark.parametrize("name", JOBS)
def test_least_passes_and_flops_by_hand(name):
    passes, flops = LEAST[name]
    least = Job(name).least(10)
    assert least == Least(*passes)
    assert least.flops(COST) == flops
    # In seconds: a pass 1, with the input gradient 2.5, a training step 4; EMR's derivative 3.
    inner, full, forward, penalty = passes
    assert least.seconds(1, 2.5, 4) == 2.5 * (inner + penalty) + 4 * full + forward + 3 * penalty
    # Where the loss's own forward pass serves EMR too.
    shared = Job(name).least(10, shares_passes=True)
    assert shared == Least(*passes, shared=penalty)
    assert shared.flops(COST) == flops - 100 * penalty
    assert shared.seconds(1, 2.5, 4) == least.seconds(1, 2.5, 4) - penalty


def test_every_job_is_listed_and_made():
    assert set(LEAST) == set(JOBS)
    made = Job("trades-emr").classifier(network(), 0.1, 3, "bfloat16", seed=4)
    assert (made.defense.name, made.attack.name, made.attack.steps) == ("trades", "pgd", 3)
    assert (made.attack_precision, made.seed) == ("bfloat16", 4)
    assert [r.name for r in made.regularizers] == ["emr"]
    assert Job("at-lstm").classifier(network(), 0.1, 3).maximizer is not None
    assert Job("standard").classifier(network(), 0.1, 3).attack is None


def network():
    stack = [keras.Input(SHAPE), layers.Conv2D(8, 3, activation="relu"), layers.Flatten()]
    return keras.Sequential([*stack, layers.Dense(3)])


@pytest.fixture
def small_matrices(monkeypatch):
    monkeypatch.setattr(module, "_MATRIX", (64, "bfloat16"))


def timed(monkeypatch):
    """Weights of every network that is made, when it is first trained."""
    made, starts = [], []
    training_step = module._training_step

    def noting(robust, x, y):
        starts.append(snapshot(robust.model.trainable_variables))
        made.append(robust)
        return training_step(robust, x, y)

    monkeypatch.setattr(module, "_training_step", noting)
    return made, starts


def test_a_tiny_measurement_has_every_figure(small_matrices, monkeypatch):
    made, starts = timed(monkeypatch)
    done = []
    found = measure(
        network,
        SHAPE,
        ["at", "at-emr"],
        batch_size=128,
        steps=2,
        epsilon=0.1,
        precision="mixed_bfloat16",
        attack_precision="bfloat16",
        rounds=4,
        progress=lambda *a: done.append(a),
    )
    assert done == [(i + 1, 6) for i in range(6)]
    # The standard step is always timed: the others' least time is made of it.
    assert [len(robust.regularizers) for robust in made] == [0, 0, 1]
    assert [robust.attack_precision for robust in made] == 3 * ["bfloat16"]
    assert {robust.model.layers[0].compute_dtype for robust in made} == {"bfloat16"}
    for start in starts[1:]:
        for one, other in zip(start, starts[0], strict=True):
            np.testing.assert_array_equal(one, other)
    assert len({id(robust.model) for robust in made}) == 3

    conv, dense = 2 * 9 * 8 * 4 * 4, 2 * 128 * 3
    flops = conv + dense
    assert found["flops_per_example"] == {
        "forward": flops,
        "to_input": flops,
        "to_weights": flops,
    }
    assert set(found["passes"]) == {"forward", "inner", "full"}
    assert list(found["jobs"]) == ["at", "at-emr"]
    peak = found["matrix_flops_per_second"]
    counts = {"forward": flops, "inner": 2 * flops, "full": 3 * flops - conv}
    counts["at"] = 2 * 2 * flops + counts["full"]
    counts["at-emr"] = counts["at"] + 4 * flops  # in mixed precision no pass is shared
    for name, part in (found["passes"] | found["jobs"]).items():
        seconds = part["seconds"]
        assert 0 < seconds["low"] <= seconds["median"] <= seconds["high"] < 60
        assert part["flops"] == 128 * counts[name]
        assert part["flops_per_second"] == pytest.approx(part["flops"] / seconds["median"])
        assert part["images_per_second"] == pytest.approx(128 / seconds["median"])
        assert part["share_of_matrix_rate"] == pytest.approx(part["flops_per_second"] / peak)
    medians = [found["passes"][n]["seconds"]["median"] for n in ("forward", "inner", "full")]
    for name, job in found["jobs"].items():
        least = Job(name).least(2)
        assert job["least_passes"] == vars(least)
        assert job["least_seconds"] == pytest.approx(least.seconds(*medians))
        ratio = job["seconds"]["median"] / job["least_seconds"]
        assert job["measured_over_least"] == pytest.approx(ratio)
        assert ratio > 0.3
    assert 0 < peak < float("inf") and found["matrix_precision"] == "bfloat16"
    assert found["accelerated"] == backend.accelerated() and found["rounds"] == 4
    assert found["unstable"] == ["at", "at-emr", "forward", "inner", "standard"]
    assert keras.config.dtype_policy().name == "float32"


def test_the_policy_is_restored_after_an_error(small_matrices):
    def broken():
        assert keras.config.dtype_policy().name == "mixed_bfloat16"
        raise KeyError

    with pytest.raises(KeyError):
        measure(broken, SHAPE, ["at"], 4, 1, 0.1, precision="mixed_bfloat16", rounds=1)
    assert keras.config.dtype_policy().name == "float32"


# What the parties take in turn: forward, inner, standard, at, matrix (seconds per FLOP).
STEADY = [1.0, 2.0, 4.0, 9.0, 1e-9]


@pytest.mark.parametrize(
    "rounds, spread, unstable",
    [
        (5, {}, []),
        (4, {}, ["at", "forward", "inner", "standard"]),
        (8, {3: 0.2}, ["at"]),
        (8, {3: 0.05, 0: 0.3}, ["forward"]),
        (8, {4: 0.5}, []),  # what stands for the device is a yardstick, not a result
    ],
)
def test_figures_that_spread_or_are_few_are_called_unstable(monkeypatch, rounds, spread, unstable):
    given = {}

    def in_turns(jobs, rounds, warm_up, progress):
        given.update(jobs=len(jobs), rounds=rounds, warm_up=warm_up)
        ramp = np.linspace(-1, 1, rounds)  # quartiles half of it apart
        return [t * (1 + spread.get(i, 0) * ramp) for i, t in enumerate(STEADY)]

    monkeypatch.setattr(module, "in_turns", in_turns)
    found = measure(network, SHAPE, ["at"], 4, 2, 0.1, rounds=rounds)
    assert given == {"jobs": 5, "rounds": rounds, "warm_up": 2}
    assert found["unstable"] == unstable
    # Two gradients and a standard step would take 8 s.
    assert found["jobs"]["at"]["measured_over_least"] == pytest.approx(9 / 8)
    assert found["passes"]["full"]["seconds"]["median"] == pytest.approx(4)
    assert found["matrix_flops_per_second"] == pytest.approx(1e9)


def test_emr_of_a_network_that_shares_passes_needs_none_of_its_own_forwards(monkeypatch):
    seconds = [1.0, 2.0, 4.0, 13.0, 1e-9]  # forward, inner, standard, at-emr, matrix
    monkeypatch.setattr(module, "in_turns", lambda *_, **__: [np.full(5, t) for t in seconds])
    job = measure(network, SHAPE, ["at-emr"], 4, 2, 0.1)["jobs"]["at-emr"]
    assert job["least_passes"]["shared"] == 1
    # Two gradients, a step, EMR's gradient without the way there, its derivative.
    assert job["least_seconds"] == pytest.approx(2 * 2 + 4 + (2 - 1) + (4 - 1))
