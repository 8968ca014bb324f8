"""Training steps on a GPU: what they compile and transfer, where the attack goes, bfloat16."""

import warnings

import keras
import numpy as np
import pytest

import keras_emr as ke
from keras_emr.attacks.base import Objective
from keras_emr.network import Network
from keras_emr.sampling import StreamSampler
from tests.builders import images, network
from tests.training.test_compilation import CASES, fit

pytestmark = pytest.mark.gpu
BACKEND = keras.backend.backend()
torch_only = pytest.mark.skipif(BACKEND != "torch", reason="torch only")


@pytest.mark.parametrize("name", CASES)
def test_nothing_is_compiled_after_the_second_step_and_nothing_leaves_the_device(name):
    seen = fit(**CASES[name](2))
    assert seen.late == {"training step": 0, "first epoch": 0, "later epochs": 0}
    assert seen.transfers == []
    weight = seen.model.model.trainable_variables[0].value
    where = str(weight.devices() if BACKEND == "jax" else weight.device).lower()
    assert "cuda" in where or "gpu" in where


def attack_of(name):
    """The attack as the defense has it, its objective on a batch, and its first state."""
    robust = ke.RobustClassifier(network(), **CASES[name](10))
    x, y = (keras.ops.convert_to_tensor(a) for a in images())
    attack = robust.training_attack
    name = attack.objective or "cross_entropy"
    objective = Objective(Network(robust.model).frozen(), name, x, y)
    return attack, objective, x, attack.begin(objective, x, attack.draw(x, StreamSampler(3)))


@torch_only
@pytest.mark.parametrize("name", ["at", "trades-emr"])
def test_steps_of_an_attack_never_wait_for_the_device(name):
    import torch

    attack, objective, x, state = attack_of(name)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(attack.steps):
            state = attack.step(objective, x, state)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert np.isfinite(keras.ops.convert_to_numpy(state[0])).all()


@torch_only
@pytest.mark.parametrize("name", CASES)
def test_waits_of_a_training_step_do_not_grow_with_the_attack(name):
    """Keras waits a few times a step (a seed, metrics, the optimizer), an attack's step never."""
    import torch

    waits = []
    x, y = (keras.ops.convert_to_tensor(a) for a in images(16))
    for steps in (1, 6):
        robust = ke.RobustClassifier(network(), **CASES[name](steps))
        robust.compile(keras.optimizers.Adam(1e-3))
        for _ in range(3):
            robust.train_step((x, y))
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                robust.train_step((x, y))
        finally:
            torch.cuda.set_sync_debug_mode("default")
        waits.append(sum("synchroniz" in str(w.message) for w in caught))
    assert waits[0] == waits[1]


@pytest.mark.parametrize("name", CASES)
def test_an_attack_stays_in_its_ball(name):
    attack, objective, x, state = attack_of(name)
    before = keras.ops.convert_to_numpy(objective.value(state[0]))
    for _ in range(attack.steps):
        state = attack.step(objective, x, state)
    found, clean = keras.ops.convert_to_numpy(state[0]), keras.ops.convert_to_numpy(x)
    moved = np.abs(found - clean).max(axis=(1, 2, 3))
    assert moved.max() <= 0.1 + 1e-6 and moved.min() > 1e-3
    assert found.min() >= 0 and found.max() <= 1
    if name != "rnn-trades":  # whose maximizer has learned nothing
        after = keras.ops.convert_to_numpy(objective.value(state[0]))
        assert after.mean() > before.mean()


@pytest.fixture
def bfloat16():
    keras.config.set_dtype_policy("mixed_bfloat16")
    yield
    keras.config.set_dtype_policy("float32")


def test_the_digits_are_learned_in_bfloat16(bfloat16):
    keras.utils.set_random_seed(0)
    data = ke.load_data("digits")
    model = ke.small_cnn(data.image_shape, data.classes)
    emr = ke.EffectiveMarginRegularizer(0.001)
    robust = ke.RobustClassifier(model, "at", ke.PGD(0.05, steps=3), regularizers=[emr])
    robust.compile(keras.optimizers.Adam(1e-3))
    history = robust.fit(data.x_train, data.y_train, batch_size=64, epochs=8, verbose=0).history
    assert np.isfinite(history["loss"]).all()
    assert history["loss"][-1] < 0.5 * history["loss"][0]
    assert {keras.backend.standardize_dtype(w.dtype) for w in model.weights} == {"float32"}
    logits = keras.ops.convert_to_numpy(keras.ops.cast(model(data.x_test), "float32"))
    assert (logits.argmax(axis=1) == data.y_test).mean() > 0.8
