"""TensorFlow's loop over an attack's steps: the unrolled steps' images, traced once."""

import keras
import numpy as np
import pytest

import keras_emr as ke
from keras_emr import backend
from keras_emr.attacks.base import Objective
from keras_emr.network import Network
from keras_emr.sampling import StreamSampler
from tests.builders import images, network

pytestmark = pytest.mark.skipif(backend.NAME != "tensorflow", reason="the others have no such loop")

X, Y = images(16)
ATTACKS = {
    "pgd": lambda: ke.PGD(0.1, steps=3),
    "pgd, restarts": lambda: ke.PGD(0.3, norm="l2", steps=3, restarts=2, noise_at_zero=True),
    "apgd": lambda: ke.APGD(0.1, steps=4),
    "learned": lambda: ke.LearnedAttack(
        0.1, maximizer=ke.LearnedMaximizer(hidden=2), steps=3, restarts=2
    ),
}


def attacked(attack, model, training, unroll):
    """Adversarial images of a compiled attack, and its graph."""
    import tensorflow as tf

    def run(x, y):
        logits = Network(model).frozen(training)
        objective = Objective(logits, "cross_entropy", x, y, unroll=unroll)
        return attack(objective, x, StreamSampler(3))

    x, y = tf.constant(X), tf.constant(Y)
    attack.draw(x, StreamSampler(0))  # makes a fresh maximizer's weights
    concrete = tf.function(run, autograph=False).get_concrete_function(x, y)
    return concrete(x, y).numpy(), concrete.graph.as_graph_def()


@pytest.mark.parametrize(
    "name, training",
    [("pgd", False), ("pgd", True), ("pgd, restarts", True), ("apgd", False), ("learned", True)],
)
def test_the_loop_finds_what_the_unrolled_steps_find(name, training):
    attack, model = ATTACKS[name](), network(dropout=0.5)
    looped, graph = attacked(attack, model, training, unroll=False)
    unrolled, straight = attacked(attack, model, training, unroll=True)
    np.testing.assert_allclose(looped, unrolled, atol=1e-6)
    assert np.abs(looped - X).max() > 0.05
    if training:  # a mask that is lost would be seen
        assert np.abs(looped - attacked(attack, model, False, unroll=False)[0]).max() > 0.01
    for program, loops in ((graph, attack.restarts), (straight, 0)):
        assert sum(node.op in ("While", "StatelessWhile") for node in program.node) == loops
    # A step is a function of its own, one for each loop.
    alone = [f for f in graph.library.function if f.attr["_noinline"].b]
    assert len(alone) == attack.restarts


def test_two_hundred_steps_are_traced_once(monkeypatch):
    from tensorflow.python.eager import context

    attack = ke.PGD(0.1, steps=3)
    robust = ke.RobustClassifier(network(dropout=0.5), "trades", attack, attack_mode="training")
    robust.compile(keras.optimizers.SGD(0.01))
    traced, step = [], type(attack).step
    monkeypatch.setattr(type(attack), "step", lambda *a: traced.append(0) or step(*a))
    known = []
    for i in range(200):
        robust.train_on_batch(X, Y)
        if i in (1, 199):
            known.append((len(traced), len(context.context().list_function_names())))
    assert known[0] == known[1] and known[0][0] >= 1
