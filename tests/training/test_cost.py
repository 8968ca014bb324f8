"""What a step costs, against counts by hand and by compilers."""

import keras
import pytest
from keras import layers

import keras_emr as ke
from keras_emr.models.resnet import resnet18
from keras_emr.models.small_cnn import small_cnn
from keras_emr.models.wide_resnet import wide_resnet
from keras_emr.training import cost
from tests.builders import images, network

BACKEND = keras.backend.backend()


def small():
    """8x8x3 -> conv 3x3 to 4, same -> BatchNorm -> pool -> depthwise 3x3 -> dense 5."""
    return keras.Sequential(
        [
            keras.Input((8, 8, 3)),
            layers.Conv2D(4, 3, padding="same"),
            layers.BatchNormalization(),
            layers.MaxPooling2D(2),
            layers.DepthwiseConv2D(3),
            layers.Flatten(),
            layers.Dense(5),
        ]
    )


def test_forward_flops_and_parameters_by_hand():
    model = small()
    found = cost.forward_cost(model, (8, 8, 3))
    conv, depthwise, dense = 8 * 8 * 9 * 3 * 4, 2 * 2 * 9 * 4, 16 * 5
    assert found.flops == 2 * (conv + depthwise + dense) == 2 * 7136
    assert found.activations == 256 + 256 + 64 + 16 + 16 + 5
    trainable = (9 * 3 * 4 + 4) + 2 * 4 + (9 * 4 + 4) + (16 * 5 + 5)
    assert cost.parameters(model.trainable_variables) == trainable == 245
    assert cost.parameters(model.variables) == trainable + 2 * 4
    assert "call" not in vars(model.layers[0])  # nothing is left of the counting


def test_a_nested_or_subclassed_network_counts_the_same():
    class Around(keras.Model):
        def __init__(self):
            super().__init__()
            self.inner = small()

        def call(self, x, training=None):
            return self.inner(x, training=training)

    around = Around()
    around(keras.ops.zeros((1, 8, 8, 3)))
    assert cost.forward_cost(around, (8, 8, 3)) == cost.forward_cost(small(), (8, 8, 3))


def passes(defense, attack=None, regularizers=(), batch_norm=True, **options):
    x, y = (keras.ops.convert_to_tensor(a) for a in images(2))
    model = network(batch_norm=batch_norm)
    robust = ke.RobustClassifier(model, defense, attack, regularizers, **options)
    robust.compile(keras.optimizers.SGD(0.1))
    found = cost.step_passes(robust, x, y)
    return (found.forward, found.to_input, found.to_weights, found.double), found.in_forward_passes


EMR = ke.EffectiveMarginRegularizer(0.1)


@pytest.mark.parametrize(
    ("arguments", "counts", "units"),
    [
        (("standard",), (1, 0, 1, 0), 3),
        # Five gradients, the loss's pass, one for the clean accuracy.
        (("at", ke.PGD(0.1, steps=5)), (7, 5, 1, 0), 14),
        # Five gradients, the reference of KL, clean and adversarial pass, EMR's.
        (("trades", ke.PGD(0.1, steps=5), [EMR]), (9, 5, 3, 1), 23),
    ],
)
def test_passes_of_a_step_by_hand(arguments, counts, units):
    assert passes(*arguments) == (counts, units)


def test_a_pass_that_emr_shares_counts_once():
    found = passes("trades", ke.PGD(0.1, steps=5), [EMR], batch_norm=False)
    assert found == ((8, 5, 2, 1), 20)


def test_passes_with_perturbed_weights_and_a_learned_maximizer():
    (forward, _, to_weights, _), _ = passes(
        "at", ke.PGD(0.1, steps=5), weight_perturbation=ke.AWP(0.01)
    )
    assert (forward, to_weights) == (8, 2)  # one more, to the weights and back
    attack = ke.LearnedAttack(0.1, maximizer=ke.LearnedMaximizer(hidden=3), steps=4)
    counts, _ = passes("at", attack)
    assert counts == (7, 5, 1, 0)  # T + 1 input gradients


def test_memory_grows_with_the_batch_and_the_optimizer():
    robust = ke.RobustClassifier(network(), "at", ke.PGD(0.1, steps=2), averaging=ke.EMA())
    robust.compile(keras.optimizers.Adam())
    robust.optimizer.build(robust.trainable_variables)
    weights = robust.model.trainable_variables
    forward = cost.forward_cost(robust.model, (6, 6, 1))
    made = cost.Passes(forward=4, to_input=2, to_weights=1)
    found = [cost.memory(robust, (6, 6, 1), n, forward, made) for n in (1, 8)]
    steps_and_rate = found[0]["optimizer"] - 2 * cost.size(weights)
    assert steps_and_rate in (8, 12)  # 32 or 64 bits for the steps
    assert found[0]["averages"] == found[0]["gradients"] == cost.size(weights)
    assert found[1]["activations"] == 8 * found[0]["activations"] > 0
    assert found[0]["total"] == sum(v for k, v in found[0].items() if k != "total")


def tensorflow_flops(fn, x):
    """FLOPs of the convolutions and products that the results of ``fn(x)`` need."""
    import tensorflow as tf
    from tensorflow.compat import v1

    concrete = tf.function(fn, autograph=False).get_concrete_function(tf.TensorSpec(x, "float32"))
    outputs = [tensor.op.name for tensor in concrete.outputs]
    needed = v1.graph_util.extract_sub_graph(concrete.graph.as_graph_def(), outputs)
    kinds = ("Conv2D", "Conv2DBackpropInput", "Conv2DBackpropFilter", "MatMul")
    names = {node.name for node in needed.node if node.op in kinds}
    of_flops = v1.profiler.ProfileOptionBuilder.float_operation()
    options = v1.profiler.ProfileOptionBuilder(of_flops).with_empty_output().build()
    found, todo = 0, [v1.profiler.profile(concrete.graph, cmd="scope", options=options)]
    while todo:
        node = todo.pop()
        found += node.float_ops if node.name in names else 0
        todo += node.children
    return found


@pytest.mark.skipif(BACKEND != "tensorflow", reason="TensorFlow's own count")
@pytest.mark.parametrize(
    "make, shape, most",
    [
        (lambda: small_cnn((28, 28, 1), 10, padding="same"), (28, 28, 1), 1),
        (lambda: wide_resnet((32, 32, 3), 10, depth=10, widen=1), (32, 32, 3), 1.03),
        pytest.param(
            lambda: resnet18((32, 32, 3), 10, width=16),
            (32, 32, 3),
            1.03,
            marks=[pytest.mark.slow, pytest.mark.long],
        ),
    ],
    ids=["small-cnn", "wide-resnet", "resnet18"],
)
def test_flops_of_every_pass_are_those_of_tensorflows_profiler(make, shape, most):
    """Its gradients of a convolution of stride 2 count a margin, the padding, as pixels."""
    import tensorflow as tf

    model = make()
    forward = cost.forward_cost(model, shape)
    weights = [v.value for v in model.trainable_variables]

    def gradients(x, of_input, of_weights):
        with tf.GradientTape() as tape:
            tape.watch(x)
            value = tf.reduce_sum(model(x, training=True) ** 2)
        found = tape.gradient(value, [x] * of_input + weights * of_weights)
        return [g for g in found if g is not None]

    batch = 2
    there_and_back = forward.flops + forward.to_input
    expected = {
        lambda x: model(x): forward.flops,
        lambda x: gradients(x, 1, 0): there_and_back,
        lambda x: gradients(x, 1, 1): there_and_back + forward.to_weights,
        lambda x: gradients(x, 0, 1): forward.step,
    }
    for i, (fn, flops) in enumerate(expected.items()):
        ratio = tensorflow_flops(fn, (batch, *shape)) / (batch * flops)
        assert 1 <= ratio <= (most if i else 1), (i, ratio)


@pytest.mark.skipif(BACKEND != "jax", reason="XLA's own count")
def test_flops_of_every_pass_are_nearly_those_of_xla():
    """Without padding, with which XLA does not multiply; it counts a little else besides."""
    import jax

    stack = [layers.Conv2D(64, 3, activation="relu"), layers.Conv2D(64, 3, strides=2)]
    stack = [keras.Input((12, 12, 32)), *stack, layers.Flatten(), layers.Dense(10)]
    model = keras.Sequential(stack)
    forward = cost.forward_cost(model, (12, 12, 32))

    def total(values, x):
        mapping = list(zip(model.trainable_variables, values, strict=True))
        with keras.StatelessScope(state_mapping=mapping):
            return keras.ops.sum(model(x) ** 2)

    values = [v.value for v in model.trainable_variables]
    x = keras.ops.zeros((2, 12, 12, 32))
    there_and_back = forward.flops + forward.to_input
    for fn, flops in (
        (total, forward.flops),
        (jax.grad(total, 1), there_and_back),
        (jax.grad(total, (0, 1)), there_and_back + forward.to_weights),
        (jax.grad(total, 0), forward.step),
    ):
        program = jax.jit(fn).lower(values, x).compile()
        assert 1 <= program.cost_analysis()["flops"] / (2 * flops) < 1.02
