"""What an attack may not touch, and exact identities of training."""

import gc
import weakref

import keras
import numpy as np
import pytest

import keras_emr as ke
from keras_emr.attacks.base import Objective
from keras_emr.network import Network
from keras_emr.sampling import StreamSampler
from tests.builders import assert_same, images, network, snapshot

X, Y = images()


def classifier(defense, model, emr=None, epsilon=0.1, **options):
    attack = None if defense == "standard" else ke.PGD(epsilon, steps=3)
    regularizers = [] if emr is None else [ke.EffectiveMarginRegularizer(emr)]
    robust = ke.RobustClassifier(
        model, defense, attack=attack, regularizers=regularizers, **options
    )
    robust.compile(keras.optimizers.Adam(1e-2))
    robust.optimizer.build(robust.trainable_variables)
    return robust


@pytest.mark.parametrize("mode", ["inference", "training"])
def test_attack_leaves_everything_but_its_own_stream(mode):
    model = network(dropout=0.4)
    robust = classifier("at", model, attack_mode=mode)
    robust.fit(X, Y, batch_size=16, verbose=0)
    dropout_seed = model.layers[4].seed_generator.state
    kept = [*model.variables, *robust.optimizer.variables, dropout_seed]
    before, stream = snapshot(kept), snapshot([robust.attack_seed.state])
    x, y = keras.ops.convert_to_tensor(X[:16]), keras.ops.convert_to_tensor(Y[:16])
    adversarial = robust.find_adversarial(Network(model), x, y, training=True)
    moved = np.abs(keras.ops.convert_to_numpy(adversarial) - X[:16]).max()
    assert 0.05 < moved <= 0.1 + 1e-6
    assert_same(before, snapshot(kept))
    assert (snapshot([robust.attack_seed.state])[0] != stream[0]).any()


@pytest.mark.parametrize("mode", ["inference", "training"])
def test_torch_global_stream_is_untouched(mode):
    if keras.backend.backend() != "torch":
        pytest.skip("torch alone has a global stream")
    import torch

    model = network(dropout=0.4)
    robust = classifier("at", model, attack_mode=mode)
    before = torch.get_rng_state()
    robust.find_adversarial(
        Network(model), torch.tensor(X[:16]), torch.tensor(Y[:16]), training=True
    )
    assert torch.equal(before, torch.get_rng_state())


def test_batch_norm_statistics_move_once_per_training_pass():
    """AT makes one pass in training mode, TRADES two; attack and EMR passes move nothing."""
    for defense, passes in (("at", 1), ("trades", 2)):
        model = network()
        robust = classifier(defense, model, emr=0.1, epsilon=0.0)
        norm = model.layers[1]
        kernel, bias = snapshot(model.layers[0].weights)
        robust.optimizer.learning_rate = 0.0
        robust.fit(X[:16], Y[:16], batch_size=16, verbose=0)
        features = keras.ops.conv(X[:16], kernel, padding="valid") + bias
        batch_mean = keras.ops.convert_to_numpy(features).mean(axis=(0, 1, 2))
        kept = 0.99**passes  # with epsilon 0 every pass sees the clean images
        np.testing.assert_allclose(
            snapshot([norm.moving_mean])[0], (1 - kept) * batch_mean, rtol=1e-4, atol=1e-6
        )


def test_training_noise_is_new_every_step_and_counted():
    robust = classifier("at", network())
    robust.fit(X, Y, batch_size=16, epochs=2, verbose=0)
    assert snapshot([robust.attack_seed.state])[0][1] == 6


def test_evaluation_takes_nothing_from_the_training_streams():
    """With validation or without, before or after `evaluate`: training draws the same noise."""
    plain, watched = (classifier("at", network(), emr=0.1) for _ in range(2))

    def streams(robust):
        return snapshot([robust.attack_seed.state, robust.regularizer_seed.state])

    for robust in (plain, watched):
        robust.fit(X, Y, batch_size=16, shuffle=False, verbose=0)
    before = streams(watched)
    first, second = (
        watched.evaluate(X, Y, batch_size=16, verbose=0, return_dict=True) for _ in range(2)
    )
    assert first == second  # its own noise, the same each time
    assert_same(before, streams(watched))
    plain.fit(X, Y, batch_size=16, epochs=2, shuffle=False, verbose=0)
    watched.fit(
        X, Y, batch_size=16, epochs=2, shuffle=False, verbose=0, validation_data=(X[:9], Y[:9])
    )
    assert_same(streams(plain), streams(watched))
    assert_same(snapshot(plain.weights), snapshot(watched.weights))


def test_training_mode_attack_uses_batch_statistics():
    model = network()
    found = {}
    for mode in ("inference", "training"):
        robust = classifier("at", model, attack_mode=mode)
        tensors = keras.ops.convert_to_tensor(X[:16]), keras.ops.convert_to_tensor(Y[:16])
        found[mode] = keras.ops.convert_to_numpy(
            robust.find_adversarial(Network(model), *tensors, training=True)
        )
    assert (found["inference"] != found["training"]).any()


def test_emr_with_lambda_zero_changes_nothing():
    plain = classifier("trades", network())
    zero = classifier("trades", network(), emr=0.0)
    histories = [
        robust.fit(X, Y, batch_size=16, epochs=2, shuffle=False, verbose=0).history
        for robust in (plain, zero)
    ]
    assert histories[0] == histories[1]
    assert_same(snapshot(plain.weights), snapshot(zero.weights))


def test_trades_with_beta_zero_is_standard_training():
    """Weights, not BatchNorm statistics: TRADES also looks at adversarial images."""
    standard = classifier("standard", network(batch_norm=False))
    trades = classifier(ke.TRADES(beta=0.0), network(batch_norm=False))
    for robust in (standard, trades):
        robust.fit(X, Y, batch_size=16, epochs=2, shuffle=False, verbose=0)
    # Two programs: a compiler may round them differently.
    for a, b in zip(snapshot(standard.weights), snapshot(trades.weights), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7)


def test_epsilon_zero_gives_robust_accuracy_equal_to_accuracy():
    robust = classifier("trades", network(), epsilon=0.0)
    robust.fit(X, Y, batch_size=16, verbose=0)
    logs = robust.evaluate(X, Y, batch_size=16, verbose=0, return_dict=True)
    assert logs["robust_accuracy"] == logs["accuracy"]


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
def test_attacks_on_mixed_precision_models_run_in_float32(policy):
    keras.config.set_dtype_policy(policy)
    try:
        low = network()
    finally:
        keras.config.set_dtype_policy("float32")
    full = network()
    for a, b in zip(low.weights, full.weights, strict=True):
        b.assign(a)
    x, y = keras.ops.convert_to_tensor(X), keras.ops.convert_to_tensor(Y)
    gradients = []
    for model in (low, full):
        logits = Network(model).frozen()
        assert keras.backend.standardize_dtype(logits(x).dtype) == "float32"
        objective = Objective(logits, "cross_entropy", x, y)
        gradients.append(keras.ops.convert_to_numpy(objective.gradient(x)))
    np.testing.assert_array_equal(gradients[0], gradients[1])
    outer = keras.backend.standardize_dtype(low(x).dtype)
    assert outer == policy.removeprefix("mixed_")


def test_restarts_in_training_keep_the_worst():
    """With many restarts no example has a lower loss than with the first alone."""
    model = network(batch_norm=False)
    x, y = keras.ops.convert_to_tensor(X), keras.ops.convert_to_tensor(Y)
    objective = Objective(Network(model).frozen(), "cross_entropy", x, y)

    def losses(restarts):
        sampler = StreamSampler(keras.random.SeedGenerator(7))
        found = ke.PGD(0.3, steps=1, restarts=restarts)(objective, x, sampler)
        logits = keras.ops.convert_to_numpy(model(found))
        wrong = logits.argmax(1) != Y
        return keras.ops.convert_to_numpy(objective.loss(model(found))), wrong

    (one, wrong_one), (many, wrong_many) = losses(1), losses(4)
    assert (wrong_many >= wrong_one).all()
    same = wrong_many == wrong_one
    assert (many[same] >= one[same] - 1e-6).all() and (many > one + 1e-4).any()


@pytest.mark.parametrize("defense", ["at", "trades"])
def test_a_step_makes_one_constant_network(defense, monkeypatch):
    """In AT the clean accuracy comes from it as well, in TRADES from the clean pass."""
    made, frozen = [], Network.frozen
    monkeypatch.setattr(Network, "frozen", lambda *a, **k: made.append(k) or frozen(*a, **k))
    robust = classifier(defense, network(), attack_precision="bfloat16")
    logs = robust.train_on_batch(X, Y, return_dict=True)
    assert logs["accuracy"] > 0
    assert made == [{"compute": "bfloat16"}]


def test_the_clean_accuracy_of_a_step_is_that_before_its_statistics_move():
    model = network(seed=1)
    robust = classifier("at", model)
    robust.optimizer.learning_rate = 0.0
    (norm,) = [v for v in model.layers if isinstance(v, keras.layers.BatchNormalization)]
    norm.momentum = 0.0

    def accuracy():
        return (keras.ops.convert_to_numpy(model(X)).argmax(1) == Y).mean()

    before = accuracy()
    logs = robust.train_on_batch(X, Y, return_dict=True)
    np.testing.assert_allclose(logs["accuracy"], before, rtol=1e-6)
    assert accuracy() != before


def test_what_a_network_has_made_does_not_keep_it():
    """The weights of every step would wait for the garbage collector."""
    held, x = Network(network()), keras.ops.convert_to_tensor(X)
    passes = [held.constant(), held.live(), held.frozen(training=True)]
    gone = weakref.ref(held)
    gc.disable()
    try:
        del held
        assert gone() is None
    finally:
        gc.enable()
    assert all(logits(x).shape == (len(X), 3) for logits in passes)
