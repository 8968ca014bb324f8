"""EMA and SWA: formulas in NumPy, what is validated and saved, BatchNorm's statistics."""

import keras
import numpy as np
import pytest

import keras_emr as ke
from keras_emr.training.averaging import EMA, SWA
from tests.builders import images, network, snapshot


def classifier(averaging, model=None):
    robust = ke.RobustClassifier(model or network(), "at", attack=ke.FGSM(0.1), averaging=averaging)
    robust.compile(keras.optimizers.SGD(0.1))
    return robust


def walk(robust, steps, epochs=None):
    """The network's weights after every step, and the averaged ones."""
    x, y = images(8)
    live, averaged = [], []
    for i in range(steps):
        if epochs:
            robust.epoch.assign(epochs[i])
        robust.train_on_batch(x, y)
        live.append(snapshot(robust.model.weights))
        with robust.averaged():
            averaged.append(snapshot(robust.model.weights))
    return live, averaged


def follow(live, shares, names, statistics):
    """``a <- d a + (1 - d) w``, moving statistics copied or averaged."""
    result, average = [], None
    for weights, d in zip(live, shares, strict=True):
        if average is None:
            average = [w.astype("float64") for w in weights]
        average = [
            w.astype("float64")
            if "moving" in name and statistics == "copy"
            else d * a + (1 - d) * w
            for a, w, name in zip(average, weights, names, strict=True)
        ]
        result.append(average)
    return result


def assert_follows(robust, live, found, shares, statistics):
    names = [w.name for w in robust.model.weights]
    assert sum("moving" in name for name in names) == 2
    for step, (wanted, got) in enumerate(
        zip(follow(live, shares, names, statistics), found, strict=True)
    ):
        for a, b, name in zip(wanted, got, names, strict=True):
            np.testing.assert_allclose(b, a, rtol=1e-4, atol=1e-6, err_msg=f"{name} at {step}")


@pytest.mark.parametrize("statistics", ["copy", "average"])
def test_ema(statistics):
    """``d = min(decay, (1 + t) / (10 + t))``; a copy before ``start``."""
    robust = classifier(EMA(0.25, start=2, statistics=statistics))
    live, found = walk(robust, 6, epochs=[0, 0, 1, 1, 1, 2])
    assert_follows(robust, live, found, [0, 0, 0.1, 2 / 11, 0.25, 0.25], statistics)
    assert not np.allclose(live[-1][0], found[-1][0], rtol=1e-3)


def test_swa_is_the_mean_of_its_samples():
    """Every second step from epoch 2 on: steps 4 and 6, after a copy until the first."""
    robust = classifier(SWA(2, every=2))
    live, found = walk(robust, 7, epochs=[0, 0, 1, 1, 1, 2, 2])
    assert_follows(robust, live, found, [0, 0, 0, 0, 1, 1 / 2, 1], "average")
    for i, got in enumerate(found[-1]):
        np.testing.assert_allclose(got, (live[3][i] + live[5][i]) / 2, rtol=1e-4, atol=1e-6)


def test_fit_validates_and_evaluates_with_the_average():
    """The logs of a classifier that averages are those of its averaged network, and training goes
    on from the live weights: those of one that does not average (to rounding: XLA compiles
    another program)."""
    x, y = images(48)
    robust, plain = classifier(EMA(0.9)), classifier(None)
    history = []
    for one in (robust, plain):
        options = {"batch_size": 16, "epochs": 2, "shuffle": False, "verbose": 0}
        history.append(one.fit(x, y, validation_data=(x, y), **options).history)
    for a, b in zip(robust.model.weights, plain.model.weights, strict=True):
        np.testing.assert_allclose(*snapshot([a, b]), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(history[0]["loss"], history[1]["loss"], rtol=1e-5)
    assert history[0]["val_loss"] != history[1]["val_loss"]
    judge = ke.RobustClassifier(robust.model, "at", attack=ke.FGSM(0.1))
    judge.compile()
    with robust.averaged():
        expected = judge.evaluate(x, y, batch_size=16, verbose=0, return_dict=True)
        with robust.averaged():  # no second exchange
            again = judge.evaluate(x, y, batch_size=16, verbose=0, return_dict=True)
    assert expected == again
    found = robust.evaluate(x, y, batch_size=16, verbose=0, return_dict=True)
    assert found["loss"] == pytest.approx(expected["loss"], rel=1e-6)
    assert history[0]["val_loss"][-1] == pytest.approx(expected["loss"], rel=1e-6)


def test_before_training_there_is_no_average():
    robust = classifier(EMA(0.9))
    before = snapshot(robust.model.weights)
    with robust.averaged():
        for a, b in zip(before, snapshot(robust.model.weights), strict=True):
            np.testing.assert_array_equal(a, b)


class Failing(keras.callbacks.Callback):
    def on_test_batch_end(self, batch, logs=None):
        raise RuntimeError("stop")


def test_an_interrupted_validation_gives_the_weights_back():
    x, y = images(16)
    robust = classifier(EMA(0.9))
    robust.fit(x, y, batch_size=4, epochs=1, verbose=0)
    before = snapshot(robust.model.weights)
    with pytest.raises(RuntimeError, match="stop"):
        robust.evaluate(x, y, batch_size=4, verbose=0, callbacks=[Failing()])
    for a, b in zip(before, snapshot(robust.model.weights), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    ("make", "fragment"),
    [
        (lambda: EMA(1.0), "1.0"),
        (lambda: EMA(-0.1), "-0.1"),
        (lambda: SWA(0), "0"),
        (lambda: SWA(1, every=0), "0"),
        (lambda: EMA(statistics="drop"), "'drop'"),
    ],
)
def test_refused(make, fragment):
    with pytest.raises(ke.UserError) as caught:
        make()
    assert f"Received: {fragment}" in str(caught.value)
