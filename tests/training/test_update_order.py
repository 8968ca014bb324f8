"""On TensorFlow every read of a variable keeps its place before or after each of its updates."""

import keras
import pytest

import keras_emr as ke
from tests.builders import images, network

if keras.backend.backend() != "tensorflow":
    pytest.skip("other backends have no order to lose", allow_module_level=True)

import tensorflow as tf
from tensorflow.python.eager import context

X, Y = images()


def optimised_step(robust):
    """The graph of a train step that TensorFlow really runs."""
    ctx = context.context()
    ctx.enable_graph_collection()
    try:
        robust.train_on_batch(X, Y)
        graphs = ctx.export_run_metadata().function_graphs
    finally:
        ctx.disable_graph_collection()
    return max((g.post_optimization_graph for g in graphs), key=lambda g: len(g.node))


def unordered(graph):
    """Pairs of a read and an update of one variable of which neither waits for the other."""
    inputs = {n.name: [i.lstrip("^").split(":")[0] for i in n.input] for n in graph.node}

    def ancestors(name):
        found, pending = set(), [name]
        while pending:
            new = set(inputs.get(pending.pop(), ())) - found
            found |= new
            pending += new
        return found

    reads = [n for n in graph.node if n.op == "ReadVariableOp"]
    updates = [n for n in graph.node if n.op.startswith("Assign") and "Variable" in n.op]
    assert reads and updates
    waits_for = {n.name: ancestors(n.name) for n in [*reads, *updates]}
    return [
        (r.name, u.name)
        for u in updates
        for r in reads
        if r.input[0] == u.input[0]
        and r.name not in waits_for[u.name]
        and u.name not in waits_for[r.name]
    ]


EMR = ke.EffectiveMarginRegularizer(1.0)
LEARNED = {"steps": 2, "maximizer": ke.LearnedMaximizer("rnn", seed=1)}
STEPS = {
    "standard with EMR": ("standard", {"regularizers": [EMR]}),
    "at with EMR": ("at", {"attack": ke.PGD(0.1, steps=2), "regularizers": [EMR]}),
    "trades with EMR": ("trades", {"attack": ke.PGD(0.1, steps=2), "regularizers": [EMR]}),
    "mart": ("mart", {"attack": ke.PGD(0.1, steps=2)}),
    "learned": ("at", {"attack": ke.LearnedAttack(0.1, **LEARNED)}),
    "learned, one step": (
        "at",
        {"attack": ke.LearnedAttack(0.1, steps=1, maximizer=ke.LearnedMaximizer(use_bias=True))},
    ),
    "generator": ("at", {"attack": ke.LearnedAttack.named("generator-naive", 0.1)}),
    "alternating": (
        "trades",
        {"attack": ke.LearnedAttack(0.1, **LEARNED), "maximizer_update": "alternating"},
    ),
}


@pytest.mark.parametrize("name", STEPS)
def test_reads_and_updates_are_ordered(name):
    defense, options = STEPS[name]
    robust = ke.RobustClassifier(network(), defense, **options)
    robust.compile(keras.optimizers.Adam(0.01), jit_compile=False)
    assert unordered(optimised_step(robust)) == []


def test_a_missing_order_is_found():
    """The check itself: a read that a graph lost sight of."""
    variable = tf.Variable(1.0)

    def step():
        read = variable.read_value()
        variable.assign_sub(0.5)
        return read

    graph = tf.function(step).get_concrete_function().graph.as_graph_def()
    assert unordered(graph) == []
    for node in graph.node:
        if node.op.startswith("AssignSub"):
            node.input[:] = [i for i in node.input if not i.startswith("^")]
    assert len(unordered(graph)) == 1
