"""Epsilon warm-up, early stopping, the guard, and resuming with everything switched on."""

import json

import keras
import numpy as np
import pytest

import keras_emr as ke
from keras_emr import backend
from keras_emr.attacks import ATTACKS, TRAINING_ATTACKS
from keras_emr.attacks.base import Objective
from keras_emr.attacks.learned import LearnedAttack
from keras_emr.data.dataset import from_arrays
from keras_emr.network import Network
from keras_emr.regularizers.schedules import WarmUp
from keras_emr.sampling import StreamSampler
from keras_emr.training.averaging import EMA
from keras_emr.training.callbacks import (
    CatastrophicOverfitting,
    OverfittingGuard,
    Recorder,
    StopEarly,
)
from keras_emr.training.learning_rates import learning_rate
from keras_emr.training.optimizers import SGD
from keras_emr.training.run_folder import RunFolder
from keras_emr.training.weight_perturbation import AWP
from tests.builders import (
    assert_same,
    assert_same_arrays,
    images,
    network,
    newest_checkpoint,
    snapshot,
)


@pytest.fixture(scope="module")
def data():
    x, y = images(96)
    parts = {"x_train": x[:64], "y_train": y[:64], "x_test": x[64:], "y_test": y[64:]}
    return from_arrays(parts, validation=0.25)


def attacks(epsilon):
    """One of each kind that trains, all lengths halved with epsilon."""
    half = epsilon / 0.2
    for name in TRAINING_ATTACKS:
        options = {} if name in ("fgsm", "bim") else {"start": "uniform"}
        options |= {} if name == "fgsm" else {"steps": 2}
        options |= {"step_size": 0.15 * half} if name in ("pgd", "bim") else {}
        options |= {"initial_step": 0.3 * half} if name == "line-search" else {}
        yield name, ATTACKS.get(name)(epsilon, **options)
    yield "l2", ke.PGD(epsilon, "l2", steps=2, start="uniform")
    maximizer = ke.LearnedMaximizer(hidden=3, seed=1)
    yield "learned", LearnedAttack(epsilon, maximizer=maximizer, steps=2, start="uniform")


@pytest.mark.skipif(backend.NAME == "jax", reason="slow uncompiled; one algorithm, in keras.ops")
def test_a_scaled_attack_is_the_attack_of_that_epsilon():
    x, y = images(4)
    objective = Objective(Network(network()).frozen(), "cross_entropy", x, y)
    x = keras.ops.convert_to_tensor(x)
    factor = keras.ops.convert_to_tensor(np.float32(0.5))
    for (name, whole), (_, half) in zip(attacks(0.2), attacks(0.1), strict=True):
        found, expected = (
            keras.ops.convert_to_numpy(one(objective, x, StreamSampler(3)))
            for one in (whole.scaled(factor), half)
        )
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=2e-6, err_msg=name)
        moved = (found - keras.ops.convert_to_numpy(x)).reshape(4, -1)
        length = np.linalg.norm(moved, 2 if name == "l2" else np.inf, axis=1)
        assert 0.04 < length.max() < 0.1001, name
        assert whole.epsilon == 0.2


class Distances(keras.callbacks.Callback):
    """How far the training attack goes in each epoch, found without a look at its options."""

    def __init__(self, x, y):
        super().__init__()
        self.x, self.y, self.found = x, y, []

    def on_epoch_begin(self, epoch, logs=None):
        robust = self.model
        x, y = keras.ops.convert_to_tensor(self.x), keras.ops.convert_to_tensor(self.y)
        adversarial = robust.find_adversarial(Network(robust.model), x, y, training=True)
        self.found.append(float(keras.ops.max(keras.ops.abs(adversarial - x))))


def test_epsilon_grows_over_the_epochs_of_one_compiled_step():
    x, y = images(16)
    robust = ke.RobustClassifier(network(), "at", attack=ke.FGSM(0.2), epsilon_schedule=WarmUp(4))
    traced = []

    class Counting(type(robust)):
        def robust_step(self, *args, **kwargs):
            traced.append(kwargs.get("training"))
            return super().robust_step(*args, **kwargs)

    robust.__class__ = Counting
    robust.compile(keras.optimizers.SGD(0.0))
    seen = Distances(x, y)
    history = robust.fit(x, y, batch_size=16, epochs=5, verbose=0, callbacks=[seen]).history
    np.testing.assert_allclose(seen.found, [0.05, 0.1, 0.15, 0.2, 0.2], atol=1e-5)
    # The compiled step follows: with the weights left alone a larger ball costs more.
    assert history["loss"][0] < history["loss"][1] < history["loss"][2] < history["loss"][3]
    if backend.NAME != "torch":
        assert len(traced) <= 3  # not once an epoch
    again = type(robust).from_config(robust.get_config())
    assert again.epsilon_schedule.epochs == 4


def rows(*values):
    return [{"epoch": i + 1, "val_robust_accuracy": v} for i, v in enumerate(values)]


def test_early_stopping_counts_from_the_best_epoch(tmp_path):
    for values, due in [((0.5,), False), ((0.5, 0.4), False), ((0.5, 0.4, 0.5), True)]:
        recorder = Recorder(RunFolder(tmp_path), "val_robust_accuracy", rows(*values))
        assert StopEarly(recorder, 2).due is due
    assert not StopEarly(Recorder(RunFolder(tmp_path), "val_robust_accuracy"), 1).due


def test_a_run_stops_early_and_stays_stopped(data, tmp_path):
    def classifier():
        robust = ke.RobustClassifier(network(), "at", attack=ke.FGSM(0.1))
        robust.compile(keras.optimizers.SGD(0.0))  # the first epoch stays the best
        return robust

    options = {"epochs": 9, "batch_size": 16, "patience": 2}
    run = ke.train(classifier(), data, tmp_path, **options)
    assert [row["epoch"] for row in run.history] == [1, 2, 3]
    again = ke.train(classifier(), data, tmp_path, resume=True, **options)
    assert again.history == run.history


def test_the_guard_remembers_the_best_of_a_resumed_run():
    guard = OverfittingGuard(0.2, rows(0.3, 0.6, 0.5))
    guard.on_epoch_end(3, {"val_robust_accuracy": 0.41})
    with pytest.raises(CatastrophicOverfitting, match=r"from 0\.600 to 0\.390 .* epoch 5"):
        guard.on_epoch_end(4, {"val_robust_accuracy": 0.39})


def test_a_collapsed_epoch_is_not_kept(data, tmp_path):
    robust = ke.RobustClassifier(network(), "at", attack=ke.FGSM(0.1))
    accuracies = iter([0.5, 0.6, 0.3, 0.9])

    class Judged(type(robust)):
        def evaluate(self, *args, **kwargs):
            return {**super().evaluate(*args, **kwargs), "robust_accuracy": next(accuracies)}

    robust.__class__ = Judged
    robust.compile(keras.optimizers.SGD(0.1))
    with pytest.raises(CatastrophicOverfitting, match=r"from 0\.600 to 0\.300 .* epoch 3"):
        ke.train(robust, data, tmp_path, epochs=4, batch_size=16, overfitting_guard=0.2)
    lines = (tmp_path / "history.jsonl").read_text().splitlines()
    assert [json.loads(line)["epoch"] for line in lines] == [1, 2]
    kept = keras.saving.load_model(tmp_path / "last.keras")
    diverged = (a != b for a, b in zip(kept.get_weights(), robust.model.get_weights(), strict=True))
    assert any(different.any() for different in diverged)


@pytest.mark.slow
def test_resuming_with_everything_on_is_exact(data, tmp_path):
    """Schedule, momentum, average, epsilon and AWP's warm-up: bit for bit as if never stopped."""

    def classifier():
        robust = ke.RobustClassifier(
            network(dropout=0.3),
            "trades",
            attack=ke.PGD(0.1, steps=1),
            averaging=EMA(0.5, start=2),
            weight_perturbation=AWP(0.01, warmup=1),
            epsilon_schedule=WarmUp(3),
        )
        rate = learning_rate("cosine", 0.1, 3, 3, warmup=1)
        options = {"weight_decay": 1e-2, "decayed": "kernels", "global_clipnorm": 1.0}
        robust.compile(SGD(rate, nesterov=True, **options))
        return robust

    def without_seconds(run):
        return [{k: v for k, v in row.items() if k != "seconds"} for row in run.history]

    states = {"a": classifier(), "b": classifier()}
    whole = ke.train(states["a"], data, tmp_path / "a", epochs=3, batch_size=16)
    ke.train(classifier(), data, tmp_path / "b", epochs=1, batch_size=16)
    keras.utils.set_random_seed(99)
    parts = ke.train(states["b"], data, tmp_path / "b", epochs=3, batch_size=16, resume=True)
    assert without_seconds(whole) == without_seconds(parts)
    (_, one), (_, other) = (newest_checkpoint(tmp_path / f) for f in "ab")
    assert_same_arrays(one, other)
    # What is kept for use is the average, what training goes on from is not.
    for folder in "ab":
        last = keras.saving.load_model(tmp_path / folder / "last.keras")
        live, kept = snapshot(states[folder].model.weights), snapshot(last.weights)
        assert int(states[folder].optimizer.iterations) == 9
        assert any((a != b).any() for a, b in zip(live, kept, strict=True))
        with states[folder].averaged():
            assert_same(snapshot(states[folder].model.weights), kept)
