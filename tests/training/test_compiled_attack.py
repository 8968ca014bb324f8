"""Nothing leaves the device inside an attack's loop."""

import keras
import pytest

import keras_emr as ke
from keras_emr.attacks.base import Objective
from keras_emr.network import Network
from keras_emr.sampling import StreamSampler
from tests.builders import images, network

X, Y = images()
BACKEND = keras.backend.backend()


def attack_on(model, x, y):
    objective = Objective(Network(model).frozen(), "cross_entropy", x, y)
    return ke.PGD(0.1, steps=5)(objective, x, StreamSampler(3))


@pytest.mark.skipif(BACKEND != "tensorflow", reason="tensorflow only")
def test_tensorflow_graph_has_no_python_in_it():
    import tensorflow as tf

    model = network()
    graph = tf.function(lambda x, y: attack_on(model, x, y), autograph=False)
    definition = graph.get_concrete_function(X, Y).graph.as_graph_def()
    ops = [node.op for node in definition.node]
    ops += [node.op for f in definition.library.function for node in f.node_def]
    # Its convolution gradients are in the graph, so the loop is.
    assert any("Conv2DBackpropInput" in op for op in ops)
    assert not [op for op in ops if "PyFunc" in op or op in ("Print", "PrintV2")]


@pytest.mark.skipif(BACKEND != "jax", reason="jax only")
def test_jax_program_has_no_callbacks():
    import jax

    model = network()
    program = str(jax.make_jaxpr(lambda x, y: attack_on(model, x, y))(X, Y))
    # Forward and input gradient of five steps: the loop is in the program.
    assert program.count("conv_general_dilated[") >= 10
    assert "callback" not in program


@pytest.mark.skipif(BACKEND != "torch", reason="torch only")
def test_torch_reads_nothing_back_between_steps():
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    class Count(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.seen = []

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.seen.append(str(function))
            return function(*args, **(kwargs or {}))

    model = network()
    attack = ke.PGD(0.1, steps=5)
    x, y = torch.tensor(X), torch.tensor(Y)
    objective = Objective(Network(model).frozen(), "cross_entropy", x, y)
    state = attack.begin(objective, x, attack.draw(x, StreamSampler(3)))
    with Count() as count:
        for _ in range(attack.steps):
            state = attack.step(objective, x, state)
    assert sum("convolution_backward" in name for name in count.seen) == 5
    # Reading a value (`item`, `if tensor:`) would be aten._local_scalar_dense.
    assert not [name for name in count.seen if "_local_scalar_dense" in name]
