"""The PyTorch side of the benchmark does what Keras does."""

import keras
import numpy as np
import pytest
import torch
from our_party import keras_weights
from torch_loops import Loop, effective_weight_norm, mart_loss, perturb, trades_loss
from torch_networks import make_network, take_weights

import keras_emr as ke
from keras_emr import backend
from keras_emr.network import Network

OPTIONS = {"epsilon": 0.1, "step_size": 0.025, "steps": 10, "momentum": 0.9}
OPTIONS |= {"trades_beta": 6.0, "mart_beta": 5.0, "emr": 0.01, "attack_precision": "float32"}


def pair(name, shape, classes=10):
    """A Keras network with weights unlike those of its layers' first days, and its twin."""
    keras.utils.set_random_seed(0)
    model = ke.make_model(name, shape, classes)
    rng = np.random.default_rng(0)
    for layer in model.layers:
        scale = 0.1 if isinstance(layer, keras.layers.BatchNormalization) else 0.02
        moved = [w + scale * rng.uniform(-1, 1, w.shape) for w in layer.get_weights()]
        layer.set_weights(moved)
    weights = {**keras_weights(model), "x": rng.uniform(size=(4, *shape)).astype("float32")}
    return model, take_weights(make_network(name, shape, classes), weights), weights["x"]


def nchw(x):
    return torch.from_numpy(np.ascontiguousarray(x.transpose(0, 3, 1, 2)))


@pytest.mark.parametrize(
    "name, shape",
    [
        ("small-cnn", (20, 16, 3)),
        ("small-cnn", (8, 12, 1)),
        ("resnet18", (16, 16, 3)),
        ("wide-resnet-10-1", (16, 16, 3)),
    ],
)
def test_a_twin_has_the_logits_of_keras(name, shape):
    model, twin, x = pair(name, shape)
    for layer in model.layers:
        if isinstance(layer, keras.layers.Dropout):
            layer.rate = 0.0  # as in the benchmark
    for training in (False, True):  # PyTorch then keeps the unbiased variance, Keras the other
        wanted = keras.ops.convert_to_numpy(model(x, training=training))
        with torch.no_grad():
            found = twin.train(training)(nchw(x)).numpy()
        assert np.std(wanted) > 1e-3
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4)


def test_weights_that_have_no_place_are_told():
    weights = keras_weights(ke.make_model("small-cnn", (16, 16, 1), 10))
    with pytest.raises(SystemExit, match="no place for 2"):
        take_weights(make_network("small-cnn", (16, 16, 1), 10), weights | {
            "Dense/3/0": np.zeros((1, 1)), "Dense/3/1": np.zeros(1)})  # fmt: skip


@pytest.mark.parametrize(
    "defense, loss", [(ke.TRADES(6.0), trades_loss), (ke.MART(5.0), mart_loss)]
)
def test_losses_and_their_gradients_are_those_of_the_defenses(defense, loss):
    rng = np.random.default_rng(1)
    logits = [2 * rng.normal(size=(16, 10)).astype("float32") for _ in range(2)]
    y = rng.integers(0, 10, 16)

    def ours(logits):
        value = keras.ops.mean(defense.loss(y.astype("int32"), *logits, 0))
        return value, value

    value, gradients = backend.gradient(ours, [keras.ops.convert_to_tensor(z) for z in logits])
    tensors = [torch.from_numpy(z).requires_grad_() for z in logits]
    found = loss(*tensors, torch.from_numpy(y), defense.beta)
    found.backward()
    np.testing.assert_allclose(found.item(), keras.ops.convert_to_numpy(value), rtol=1e-5)
    for tensor, gradient in zip(tensors, gradients, strict=True):
        wanted = keras.ops.convert_to_numpy(gradient)
        np.testing.assert_allclose(tensor.grad.numpy(), wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["small-cnn", "wide-resnet-10-1"])
def test_effective_weight_norm_is_the_regularizer(name):
    model, twin, x = pair(name, (16, 16, 3))
    ours = ke.EffectiveMarginRegularizer(0.01)(Network(model), x, x, None, None)
    found = effective_weight_norm(twin.eval(), nchw(x))
    wanted = keras.ops.convert_to_numpy(ours).mean()
    assert wanted > 1e-6
    np.testing.assert_allclose(found.item(), wanted, rtol=1e-3)
    found.backward()
    kernels = [p for p in twin.parameters() if p.ndim == 4]
    assert len(kernels) >= 4 and all(float(p.grad.abs().max()) > 0 for p in kernels)


@pytest.mark.parametrize("divergence", [False, True])
def test_the_attack_stays_in_the_ball_and_leaves_the_network_alone(divergence):
    _, twin, x = pair("small-cnn", (16, 16, 1))
    x, y = nchw(x), torch.arange(4)
    found = perturb(twin.eval(), x, y, OPTIONS, divergence, small=divergence)
    assert float((found - x).abs().max()) <= OPTIONS["epsilon"] + 1e-6
    assert 0 <= float(found.min()) and float(found.max()) <= 1
    assert float((found - x).abs().mean()) > 0.5 * OPTIONS["epsilon"]
    assert all(p.grad is None for p in twin.parameters())


def first_loss(job, options, **more):
    torch.manual_seed(0)
    _, twin, x = pair("small-cnn", (16, 16, 1))
    with torch.no_grad():  # logits of variance one, as in the benchmark
        last = twin.dense[-1]
        last.weight.copy_(torch.randn(10, 200))
        last.weight.div_(twin(nchw(x)).std())
    loop = Loop(twin, job, options, **more)
    loop.restart(0.0)
    layout = x.transpose(0, 3, 1, 2)
    return loop.step(layout if more.get("best") else np.ascontiguousarray(layout), np.arange(4))


@pytest.mark.parametrize("job", ["at", "trades", "mart", "at-emr"])
def test_half_the_epsilon_is_seen_in_the_loss(job):
    """By far more than the benchmark's tolerance of 3 %."""
    whole = first_loss(job, OPTIONS)["loss"]
    half = first_loss(job, OPTIONS | {"epsilon": 0.05, "step_size": 0.0125})["loss"]
    assert half < 0.9 * whole


@pytest.mark.parametrize("job", ["standard", "at", "trades", "mart", "at-emr"])
def test_channels_last_is_the_same_step(job):
    plain, best = first_loss(job, OPTIONS), first_loss(job, OPTIONS, best=True)
    # Gradients that are zero but for rounding may have the other sign.
    assert best["loss"] == pytest.approx(plain["loss"], rel=0.03)
    assert (best["penalty"] is None) == (job != "at-emr")


@pytest.mark.parametrize("best, attacked_in", [(True, "bfloat16"), (False, "float32")])
def test_of_the_best_loop_the_attack_alone_may_be_in_bfloat16(monkeypatch, best, attacked_in):
    kinds, conv = [], torch.nn.functional.conv2d

    def watched(*arguments, **options):
        result = conv(*arguments, **options)
        kinds.append(str(result.dtype).removeprefix("torch."))
        return result

    monkeypatch.setattr(torch.nn.Conv2d, "_conv_forward", lambda self, x, w, b: watched(x, w, b))
    low = first_loss("at", OPTIONS | {"attack_precision": "bfloat16"}, best=best)
    passes = kinds[::4][1:]  # of four convolutions; the first pass was for the scale
    assert passes == [attacked_in] * 10 + ["float32"]
    assert low["loss"] == pytest.approx(first_loss("at", OPTIONS)["loss"], rel=0.03)


def test_a_step_trains_with_momentum_and_a_restart_forgets_it():
    _, twin, x = pair("small-cnn", (16, 16, 1))
    loop, weight = Loop(twin, "standard", OPTIONS), twin.dense[-1].weight
    x, y = np.ascontiguousarray(x.transpose(0, 3, 1, 2)), np.arange(4)
    loop.restart(0.0)
    before = weight.detach().clone()
    first = loop.step(x, y)["loss"]
    assert torch.equal(weight, before)
    loop.restart(0.01)
    assert not loop.optimizer.state
    loop.step(x, y)
    once = weight.detach() - before
    torch.testing.assert_close(once, -0.01 * weight.grad)
    last = [loop.step(x, y)["loss"] for _ in range(5)][-1]
    assert last < first
