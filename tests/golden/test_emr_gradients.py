"""Weight gradients of EMR against float64 finite differences; what they must not depend on."""

import keras
import numpy as np
import pytest
from keras import ops

from keras_emr import EffectiveMarginRegularizer
from keras_emr.network import Network
from keras_emr.sampling import StreamSampler
from tests.golden import reference as ref

K, D, N = 4, 8, 6
SHAPE = (2, 2, 2)
RELEASED = {
    "at-emr-released": (3.0, 40.0, 60, 90),
    "trades-emr-released": (1.0, 1.0, 60, 120),
    "mail-at-emr-released": (1.0, 0.1, 75, 90),
    "mail-trades-emr-released": (1.0, 0.1, 75, 90),
}


def setup(activation, seed=3, hidden=(7,)):
    rng = np.random.default_rng(seed)
    weights = ref.mlp_weights(rng, D, *hidden, K)
    model = ref.build_mlp(weights, activation, SHAPE)
    return weights, model, rng.uniform(size=(N, *SHAPE)), rng.integers(0, K, N)


def emr_gradients(model, x, y, x_adv=None, dtype="float64", **options):
    """Gradient of the summed penalty; ``x_adv``: function without arguments, or ``x``."""
    regularizer = EffectiveMarginRegularizer(**options)
    network, labels = Network(model), ref.tensor(y, "int32")

    def total():
        images = ref.tensor(x, dtype) if x_adv is None else x_adv()
        return ops.sum(regularizer(network, ref.tensor(x, dtype), images, labels, StreamSampler(0)))

    return ref.weight_gradients(model, total)


def reference_gradients(weights, activation, x, y, weighting, norm, power, frozen=True):
    """Finite differences of the NumPy penalty; ``c`` kept where it is, or following ``z``."""

    def cotangent(z):
        return None if weighting == "exact" else ref.cotangent(weighting, z, y)

    fixed = cotangent(ref.mlp_forward(weights, activation, x)[0])

    def total(i, value):
        moved = [*weights[:i], value, *weights[i + 1 :]]
        z, jacobian, _ = ref.mlp_forward(moved, activation, x)
        return ref.penalty(jacobian, fixed if frozen else cotangent(z), norm, power).sum()

    return [ref.finite_difference(lambda v, i=i: total(i, v), w) for i, w in enumerate(weights)]


def assert_close(got, want, tolerance=1e-4):
    for i, (g, w) in enumerate(zip(got, want, strict=True)):
        assert np.abs(g - w).max() <= tolerance * max(np.abs(w).max(), 1e-6), i


NORMS = [("l2", 2), ("l1", 2), ("linf", 2), ("l2", 1)]
WEIGHTINGS = ["softmax", "predicted", "runner_up_difference", "exact"]


@pytest.mark.parametrize(
    "activation, weighting, norm, power",
    [
        *(("tanh", w, *n) for w in WEIGHTINGS for n in NORMS),
        *((a, w, "l2", 2) for a in ("softplus", "gelu") for w in WEIGHTINGS),
    ],
)
def test_weight_gradients(activation, weighting, norm, power):
    weights, model, x, y = setup(activation)
    got = emr_gradients(model, x, y, weighting=weighting, norm=norm, power=power)
    want = reference_gradients(weights, activation, x, y, weighting, norm, power)
    assert_close(got, want)
    assert np.abs(want[1]).max() > 1e-3  # hidden biases act through the curvature
    assert not np.any(got[-1])  # output biases do not act at all


def test_weight_gradients_of_a_deeper_network():
    weights, model, x, y = setup("tanh", hidden=(7, 5))
    want = reference_gradients(weights, "tanh", x, y, "softmax", "l2", 2)
    assert_close(emr_gradients(model, x, y), want)


def test_weight_gradients_of_keras_layers():
    """Conv2D and Dense in float32; the reference is the convolution as a matrix."""
    rng = np.random.default_rng(2)
    kernel, bias = rng.normal(size=(3, 3, 2, 3)) / 3, rng.normal(size=3)
    dense = rng.normal(size=(27, K)) / 5, rng.normal(size=K)
    x, y = rng.uniform(size=(N, 5, 5, 2)), rng.integers(0, K, N)
    model = keras.Sequential(
        [
            keras.Input((5, 5, 2)),
            keras.layers.Conv2D(3, 3, activation="softplus"),
            keras.layers.Flatten(),
            keras.layers.Dense(K),
        ]
    )
    model.set_weights([kernel, bias, *dense])

    def matrix(kernel):
        m = np.zeros((5, 5, 2, 3, 3, 3))
        for i, j in np.ndindex(3, 3):
            m[i : i + 3, j : j + 3, :, i, j] = kernel
        return m.reshape(50, 27)

    weights = [kernel, bias, *dense]

    def forward(kernel, bias, *dense):
        return ref.mlp_forward([matrix(kernel), np.tile(bias, 9), *dense], "softplus", x)

    c = ref.cotangent("softmax", forward(*weights)[0], y)
    want = [
        ref.finite_difference(
            lambda v, i=i: ref.penalty(forward(*weights[:i], v, *weights[i + 1 :])[1], c).sum(),
            w,
        )
        for i, w in enumerate(weights)
    ]
    got = emr_gradients(model, x, y, dtype="float32")
    assert_close(got, want)
    assert np.abs(want[1]).max() > 1e-3


@pytest.mark.parametrize("central", [False, True])
@pytest.mark.parametrize("norm, power", [("l2", 2), ("l1", 2), ("linf", 2), ("l2", 1)])
def test_6_finite_differences_have_the_same_gradient(norm, power, central):
    """Within one linear region of a ReLU network."""
    weights, model, x, y = setup("relu")
    hidden = ref.mlp_forward(weights, "relu", x)[2][0]
    assert (np.abs(hidden) > 1e-3 * np.abs(weights[0]).sum(0)).all()
    options = {"norm": norm, "power": power}
    exact = emr_gradients(model, x, y, **options)
    got = emr_gradients(
        model, x, y, estimator="finite_difference", step=1e-3, central=central, **options
    )
    assert_close(got, exact, 1e-6)
    assert np.abs(exact[0]).max() > 1e-2


@pytest.mark.parametrize("estimator", ["double_backprop", "finite_difference"])
def test_8_no_gradient_through_the_class_weights(estimator):
    """softmax follows the weights of the network; its gradient must not."""
    weights, model, x, y = setup("tanh")
    frozen, moving = (
        reference_gradients(weights, "tanh", x, y, "softmax", "l2", 2, frozen=f)
        for f in (True, False)
    )
    assert np.abs(frozen[2] - moving[2]).max() > 0.05 * np.abs(frozen[2]).max()
    step = {"step": 1e-5, "central": True} if estimator == "finite_difference" else {}
    assert_close(emr_gradients(model, x, y, estimator=estimator, **step), frozen)


@pytest.mark.parametrize("estimator", ["double_backprop", "finite_difference"])
@pytest.mark.parametrize("at", ["adversarial", "both"])
def test_8_no_gradient_through_the_adversarial_image(at, estimator):
    """``x_adv`` computed from the weights counts as a constant."""
    weights, model, x, y = setup("tanh")
    options = {"at": at, "estimator": estimator}

    def dependent():
        shift = ops.sum(model.trainable_variables[0]) + ops.sum(model.trainable_variables[2])
        return ref.tensor(x) + 0.1 * shift

    shift = weights[0].sum() + weights[2].sum()
    frozen = ref.tensor(x + 0.1 * shift)
    got = emr_gradients(model, x, y, dependent, **options)
    want = emr_gradients(model, x, y, lambda: frozen, **options)
    assert_close(got, want, 1e-9)
    assert np.abs(want[0]).max() > 1e-2


def test_8_control_the_dependent_image_would_matter():
    """The previous test can fail: the penalty does change with that shift of the image."""
    weights, _, x, y = setup("tanh")

    def total(value):
        shift = value.sum() + weights[2].sum()
        z, jacobian, _ = ref.mlp_forward(weights, "tanh", x + 0.1 * shift)
        return ref.penalty(jacobian, ref.cotangent("softmax", z, y)).sum()

    assert np.abs(ref.finite_difference(total, weights[0])).max() > 1e-3


@pytest.mark.parametrize(
    "weighting, estimator",
    [
        ("softmax", "double_backprop"),
        ("exact", "double_backprop"),
        ("softmax", "finite_difference"),
    ],
)
def test_9_examples_do_not_depend_on_their_batch(weighting, estimator):
    model = keras.Sequential(
        [
            keras.Input(SHAPE),
            keras.layers.Flatten(),
            keras.layers.Dense(7, "tanh"),
            keras.layers.BatchNormalization(),
            keras.layers.Dense(K),
        ]
    )
    rng = np.random.default_rng(0)
    signs = [rng.choice([-1.0, 1.0], w.shape) if w.ndim > 1 else 1.0 for w in model.get_weights()]
    model.set_weights(
        [
            s * rng.uniform(0.2, 0.8, w.shape)
            for s, w in zip(signs, model.get_weights(), strict=True)
        ]
    )
    x, y = rng.uniform(size=(N, *SHAPE)), rng.integers(0, K, N)
    network = Network(model)

    def penalties(x, y, bn_mode="inference"):
        options = {"weighting": weighting, "estimator": estimator, "bn_mode": bn_mode}
        images, labels = ref.tensor(x, "float32"), ref.tensor(y, "int32")
        regularizer = EffectiveMarginRegularizer(**options)
        return ref.numpy(regularizer(network, images, images, labels, StreamSampler(0)))

    others, labels = 1 - x, (y + 1) % K
    others[:2], labels[:2] = x[:2], y[:2]
    together = penalties(x, y)
    tolerance = 1e-5 if estimator == "double_backprop" else 1e-3  # float32
    assert together.min() > 1e-6
    replaced = penalties(others, labels)
    np.testing.assert_allclose(replaced[:2], together[:2], rtol=tolerance)
    assert np.abs(replaced[2:] / together[2:] - 1).min() > tolerance
    order = [3, 0, 5, 1, 2, 4]
    np.testing.assert_allclose(penalties(x[order], y[order]), together[order], rtol=tolerance)
    mixed = penalties(x, y, "batch"), penalties(others, labels, "batch")
    assert np.abs(mixed[0][:2] / mixed[1][:2] - 1).max() > 1e-2  # batch statistics do mix them


@pytest.mark.parametrize("name", RELEASED)
def test_presets(name):
    """0-based epochs: 58 is the 59th, before the drop at the start of the 60th."""
    weight, temperature, first, second = RELEASED[name]
    preset = EffectiveMarginRegularizer.preset(name)
    wanted = {
        "weight": weight,
        "temperature": temperature,
        "reduction": "released",
        "weighting": "softmax",
        "norm": "l2",
        "power": 2,
        "center": False,
        "bn_mode": "inference",
        "estimator": "double_backprop",
    }
    assert {key: getattr(preset, key) for key in wanted} == wanted
    assert preset.at in (None, "adversarial")
    epochs = [0, first - 2, first - 1, second - 2, second - 1, second + 50]
    for epoch, factor in zip(epochs, [1, 1, 0.1, 0.1, 0.01, 0.01], strict=True):
        for value in (epoch, ops.convert_to_tensor(epoch, dtype="int32")):
            got = float(preset.scale(value, 128))
            assert got == pytest.approx(weight / 128 * factor, rel=1e-6)
    changed = EffectiveMarginRegularizer.preset(name, reduction="mean", weight=0.5)
    assert float(changed.scale(first - 1, 128)) == pytest.approx(0.05, rel=1e-6)
