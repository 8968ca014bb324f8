"""Everything of Keras keeps working around RobustClassifier."""

import keras
import numpy as np
import pytest

import keras_emr as ke
from tests.builders import assert_same, images, network, snapshot

TORCH = keras.backend.backend() == "torch"
X, Y = images()


def classifier(defense="trades", steps=2, emr=0.05, optimizer=None, model=None, **options):
    attack = None if defense == "standard" else ke.PGD(0.1, steps=steps)
    regularizers = [ke.EffectiveMarginRegularizer(emr)] if emr else []
    robust = ke.RobustClassifier(
        model or network(), defense, attack=attack, regularizers=regularizers, **options
    )
    robust.compile(optimizer or keras.optimizers.SGD(0.05))
    return robust


class Batches(keras.utils.PyDataset):
    def __len__(self):
        return len(X) // 16

    def __getitem__(self, i):
        return X[16 * i : 16 * i + 16], Y[16 * i : 16 * i + 16]


def tf_data():
    tf = pytest.importorskip("tensorflow")
    return tf.data.Dataset.from_tensor_slices((X, Y)).batch(16)


@pytest.mark.parametrize("source", ["tf.data", "PyDataset"])
def test_every_kind_of_data_gives_the_same_weights(source):
    reference, other = classifier(), classifier()
    reference.fit(X, Y, batch_size=16, epochs=2, shuffle=False, verbose=0)
    data = tf_data() if source == "tf.data" else Batches()
    other.fit(data, epochs=2, shuffle=False, verbose=0)
    assert_same(snapshot(reference.weights), snapshot(other.weights))


def test_logs_and_their_validation_twins():
    history = classifier().fit(X, Y, validation_data=(X, Y), verbose=0).history
    names = ["loss", "accuracy", "robust_accuracy", "emr"]
    assert sorted(history) == sorted(names + [f"val_{name}" for name in names])


def test_standard_training_does_not_claim_a_robust_accuracy():
    robust = classifier("standard", emr=0, eval_attack=ke.PGD(0.1, steps=2))
    history = robust.fit(X, Y, validation_data=(X, Y), verbose=0).history
    assert sorted(history) == [
        "accuracy",
        "loss",
        "val_accuracy",
        "val_loss",
        "val_robust_accuracy",
    ]


def test_loss_is_the_mean_of_the_defense_plus_lambda_emr():
    """The logged figures, recomputed from the outside."""
    model = network(batch_norm=False)
    robust = classifier("standard", emr=0.5, model=model)
    logs = robust.evaluate(X, Y, batch_size=len(X), verbose=0, return_dict=True)
    z = keras.ops.convert_to_numpy(model(X)).astype("float64")
    log_p = z - np.log(np.exp(z).sum(1, keepdims=True))
    cross_entropy = -log_p[np.arange(len(Y)), Y].mean()
    assert logs["loss"] == pytest.approx(cross_entropy + 0.5 * logs["emr"], rel=1e-5)
    assert logs["accuracy"] == pytest.approx((z.argmax(1) == Y).mean(), abs=1e-7)


def test_sample_weights_follow_keras():
    """Weight w multiplies an example's loss and the sum is divided by the batch size."""
    half = np.repeat([2.0, 0.0], 24).astype("float32")
    # Without BatchNorm and noise, weights (2, 0) on a batch are the mean over its first half.
    weighted, cut = (
        classifier(model=network(batch_norm=False), defense="at", emr=0.1) for _ in range(2)
    )
    for robust in (weighted, cut):
        robust.attack = robust.attack.with_defaults()
        robust.attack.start = "none"
    weighted.fit(X, Y, sample_weight=half, batch_size=48, shuffle=False, verbose=0)
    cut.fit(X[:24], Y[:24], batch_size=24, shuffle=False, verbose=0)
    for a, b in zip(snapshot(weighted.weights), snapshot(cut.weights), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-7)


def test_class_weights_change_the_loss():
    losses = [
        classifier(emr=0).fit(X, Y, batch_size=48, class_weight=w, verbose=0).history["loss"][0]
        for w in ({0: 1.0, 1: 1.0, 2: 1.0}, {0: 3.0, 1: 3.0, 2: 3.0})
    ]
    assert losses[1] == pytest.approx(3 * losses[0], rel=1e-5)


def test_callbacks_see_robust_accuracy(tmp_path):
    path = tmp_path / "best.keras"
    seen = []
    robust = classifier(optimizer=keras.optimizers.SGD(0.0))
    history = robust.fit(
        X,
        Y,
        validation_data=(X, Y),
        epochs=6,
        verbose=0,
        callbacks=[
            keras.callbacks.EarlyStopping("val_robust_accuracy", mode="max", patience=1),
            keras.callbacks.ModelCheckpoint(str(path), "val_robust_accuracy", mode="max"),
            keras.callbacks.LearningRateScheduler(lambda epoch: 0.0),
            keras.callbacks.LambdaCallback(on_epoch_end=lambda e, logs: seen.append(sorted(logs))),
        ],
    )
    # Nothing learns at rate 0: the second epoch is no better, and training stops.
    assert len(history.epoch) == 2 and "val_robust_accuracy" in seen[0]
    assert isinstance(keras.models.load_model(path), ke.RobustClassifier)


def test_own_metrics_get_labels_and_logits():
    robust = classifier(emr=0)
    robust.compile(
        keras.optimizers.SGD(0.0),
        metrics=[keras.metrics.SparseTopKCategoricalAccuracy(k=3, name="top3")],
    )
    assert robust.evaluate(X, Y, verbose=0, return_dict=True)["top3"] == 1.0


def test_steps_per_execution():
    single, joined = classifier(), classifier()
    joined.compile(keras.optimizers.SGD(0.05), steps_per_execution=3)
    if TORCH:  # Keras itself has no such thing on torch, and says so.
        with pytest.raises(ValueError, match="steps_per_execution"):
            joined.fit(X, Y, batch_size=16, verbose=0)
        return
    single.fit(X, Y, batch_size=16, shuffle=False, verbose=0)
    joined.fit(X, Y, batch_size=16, shuffle=False, verbose=0)
    assert_same(snapshot(single.weights), snapshot(joined.weights))


def test_gradient_accumulation_equals_the_larger_batch():
    def trained(batch_size, optimizer):
        robust = classifier("at", model=network(batch_norm=False), optimizer=optimizer)
        robust.attack.start = "none"
        robust.fit(X[:32], Y[:32], batch_size=batch_size, shuffle=False, verbose=0)
        return snapshot(robust.model.weights)

    sgd = keras.optimizers.SGD
    accumulated = trained(16, sgd(0.1, gradient_accumulation_steps=2))
    for a, b in zip(accumulated, trained(32, sgd(0.1)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
def test_mixed_precision(policy):
    keras.config.set_dtype_policy(policy)
    try:
        model = network()
        robust = classifier(model=model, optimizer=keras.optimizers.Adam(1e-2))
        history = robust.fit(X, Y, batch_size=16, epochs=15, verbose=0).history
    finally:
        keras.config.set_dtype_policy("float32")
    scaled = type(robust.optimizer).__name__ == "LossScaleOptimizer"
    assert scaled == (policy == "mixed_float16")
    assert model.layers[0].compute_dtype == policy.removeprefix("mixed_")  # left as it was
    assert history["loss"][-1] < 0.6 * history["loss"][0] and np.isfinite(history["emr"]).all()


def test_the_loss_is_scaled_in_half_precision():
    """An SGD step under mixed_float16 is the float32 step: scaled before, unscaled after.

    Unscaled before, it would be 1024 times too small.
    """

    def step(policy):
        keras.config.set_dtype_policy(policy)
        try:
            model = network(batch_norm=False)
        finally:
            keras.config.set_dtype_policy("float32")
        optimizer = keras.optimizers.SGD(0.1)
        if policy == "mixed_float16":
            optimizer = keras.optimizers.LossScaleOptimizer(optimizer, initial_scale=1024.0)
        robust = classifier("trades", model=model, optimizer=optimizer)
        before = snapshot(robust.model.weights)
        robust.fit(X, Y, batch_size=48, shuffle=False, verbose=0)
        after = snapshot(robust.model.weights)
        return [b - a for a, b in zip(before, after, strict=True)]

    for low, full in zip(step("mixed_float16"), step("float32"), strict=True):
        assert np.linalg.norm(full) > 1e-4
        assert np.linalg.norm(low - full) < 0.02 * np.linalg.norm(full)


@pytest.mark.slow  # JAX compiles every operation by itself
def test_run_eagerly_gives_the_same_weights():
    compiled, eager = classifier(), classifier()
    eager.compile(keras.optimizers.SGD(0.05), run_eagerly=True)
    for robust in (compiled, eager):
        robust.fit(X[:16], Y[:16], batch_size=16, shuffle=False, verbose=0)
    for a, b in zip(snapshot(compiled.weights), snapshot(eager.weights), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_weight_regularizers_count_once_whatever_the_attack_does():
    model = keras.Sequential(
        [
            keras.Input((6, 6, 1)),
            keras.layers.Flatten(),
            keras.layers.Dense(3, kernel_regularizer=keras.regularizers.L2(1.0)),
        ]
    )
    plain = classifier("at", emr=0, model=model, steps=3)
    with_penalty = plain.evaluate(X, Y, batch_size=48, verbose=0, return_dict=True)["loss"]
    kernel = keras.ops.convert_to_numpy(model.layers[-1].kernel)
    model.layers[-1].kernel.regularizer = None
    plain.compile(keras.optimizers.SGD(0.05))
    without = plain.evaluate(X, Y, batch_size=48, verbose=0, return_dict=True)["loss"]
    assert with_penalty - without == pytest.approx((kernel**2).sum(), rel=1e-5)


def test_no_compilation_after_the_second_step():
    """The step's Python body runs only while a backend traces it; torch runs it every time."""
    robust = classifier()
    calls = []
    original = robust.robust_step

    def counted(*args, **kwargs):
        calls.append(kwargs["training"])
        return original(*args, **kwargs)

    robust.robust_step = counted
    per_step = []
    counter = keras.callbacks.LambdaCallback(
        on_train_batch_end=lambda batch, logs: per_step.append(len(calls))
    )
    robust.fit(X, Y, batch_size=8, epochs=2, verbose=0, callbacks=[counter])
    assert len(per_step) == 12
    if TORCH:
        assert per_step == list(range(1, 13))
    else:
        assert per_step[-1] == per_step[1] >= 1


def test_a_loss_in_compile_is_refused():
    with pytest.raises(ke.UserError, match="takes its loss from the defense"):
        classifier().compile("adam", loss="mse")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"defense": "trades"}, "needs an attack"),
        ({"defense": "tradez", "attack": None}, "did you mean 'trades'"),
        ({"defense": "at", "attack": "pgd"}, "must be an attack that runs inside"),
        ({"defense": "at", "attack": ke.PGD(0.1), "attack_mode": "eval"}, "unknown attack_mode"),
    ],
)
def test_mistakes_are_named(options, message):
    with pytest.raises(ke.UserError, match=message):
        ke.RobustClassifier(network(), **options)
