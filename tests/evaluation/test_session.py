"""How many examples an attack takes at a time."""

from types import SimpleNamespace

import numpy as np
import pytest

import keras_emr as ke
from keras_emr import backend
from keras_emr.attacks import ATTACKS
from keras_emr.evaluation import session as session_module
from keras_emr.evaluation import target as target_module
from keras_emr.evaluation.session import open_session, portions
from keras_emr.evaluation.target import as_target
from tests.builders import images, network

X, Y = images(100, classes=4)


def clock(monkeypatch, tell):
    monkeypatch.setattr(session_module, "time", SimpleNamespace(perf_counter=tell))


@pytest.mark.parametrize(
    "before,seconds,sizes",
    [
        (1e-4, 1e-3, [80, 20]),  # of an example in an attack; a batch holds 80
        (0.75, 1.25, [80, 20]),  # a minute's work: 80, then 48
        (1.25, 1.25, [48, 48, 4]),
        (9.0, 1.25, [32, 48, 20]),
        (9.0, 9.0, [32, 32, 32, 4]),  # never fewer
    ],
)
def test_queries_take_as_many_examples_as_a_minute_does(monkeypatch, before, seconds, sizes):
    spent = [0.0]
    clock(monkeypatch, lambda: spent[0])

    def model(x):
        return np.tile(np.float32([1, 0, 0, 0]), (len(x), 1))

    target = as_target(model, X.shape[1:], batch_size=80)
    target.predict(X[:1])
    attack = ATTACKS.get("square")(0.1, steps=10)
    target.pace = before / 10
    session = open_session(target, attack, 80)
    search, taken = attack.search, []

    def slow(predict, x, *rest):
        spent[0] += seconds * len(x)
        taken.append(len(x))
        return search(predict, x, *rest)

    monkeypatch.setattr(attack, "search", slow)
    for index in portions(session, np.arange(len(X))):
        assert not session.find(X[index], 0 * index, index, 0, 0).broken.any()
    assert taken == sizes


@pytest.mark.parametrize(
    "name,options",
    [
        ("square", {"epsilon": 0.01, "steps": 40}),
        ("nes", {"epsilon": 0.01, "steps": 3, "samples": 7}),
        ("spsa", {"epsilon": 0.01, "steps": 3, "samples": 7}),
        ("boundary", {"steps": 200}),
        ("hopskipjump", {"steps": 12}),
        ("sign-opt", {"steps": 6}),
    ],
)
def test_queries_are_about_as_many_as_was_planned(name, options):
    model = network(batch_norm=False, classes=4)
    target = as_target(model, X.shape[1:])
    y = target.predict(X[:8]).argmax(1)
    attack = ATTACKS.get(name)(**options)
    found = open_session(target, attack, 8).find(X[:8], y, np.arange(8), 0, 0)
    share = found.queries / (8 * attack.steps * attack.queries_per_step)
    assert 0.5 < share < 1.5, share


def test_a_target_knows_its_fastest_pace(monkeypatch):
    spent = [0.0]
    monkeypatch.setattr(target_module, "time", SimpleNamespace(perf_counter=lambda: spent[0]))

    def model(x):
        spent[0] += 10 if len(x) > 20 else 1
        return np.eye(4)[: len(x)] if len(x) < 4 else np.tile(np.eye(4), (len(x) // 4, 1))

    target = as_target(model, X.shape[1:], batch_size=40)
    assert target.pace == np.inf
    target.predict(X)  # 40, 40 and 20
    assert target.pace == 1 / 20 and target.asked == 100
    target.predict(X[:4])
    assert target.pace == 1 / 20


def test_the_time_that_queries_take_changes_no_result(monkeypatch):
    model = network(batch_norm=False, classes=4)
    suite = ke.AutoAttack(0.3, attacks=[ATTACKS.get("square")(0.3, steps=20)])
    found = []
    for seconds in (0.0, 10.0):
        ticks = iter(np.arange(0, 1e6) * seconds)
        clock(monkeypatch, lambda ticks=ticks: next(ticks))
        found.append(suite.run(model, X, Y, batch_size=64))
    np.testing.assert_array_equal(found[0].robust, found[1].robust)
    np.testing.assert_array_equal(found[0].x_adv, found[1].x_adv)
    assert 0 < found[0].robust.sum() < found[0].correct.sum()


@pytest.mark.parametrize(
    "steps,rows,shape",
    [
        (10, 3, 128),  # a short attack: one shape is enough
        (100, 3, 32),
        (100, 33, 128),
        (400, 3, 16),
        (400, 17, 32),
        (400, 65, 128),
    ],
)
def test_few_examples_of_a_long_attack_have_a_smaller_shape(monkeypatch, steps, rows, shape):
    sizes = []

    class Run:
        def __init__(self, model, attack, size):
            assert size == 128

        def attack_batch(self, x, y, index, restart, seed, tick, size):
            sizes.append(size)
            return x, np.zeros(len(x), "float32")

    monkeypatch.setattr(session_module, "AttackRun", Run)
    target = as_target(network(batch_norm=False, classes=4), X.shape[1:], batch_size=128)
    session = open_session(target, ke.PGD(0.1, steps=steps), 128)
    found = session.find(X[:rows], Y[:rows], np.arange(rows), 0, 0)
    fixed = steps < 100 or backend.NAME == "jax"  # where any size is compiled once, it is exact
    assert sizes == [shape if fixed else rows] and len(found.images) == rows
