"""Learned maximizers against an unroll written from the formulas alone.

:func:`unroll` runs in NumPy float64 (values, finite differences) and on the backend's tensors
(autodiff through the *loss*, which the library never does).
"""

import contextlib
import functools
import math

import keras
import numpy as np
import pytest
from keras import ops
from keras.src.backend.common import dtypes

import keras_emr as ke
from keras_emr import backend
from keras_emr.attacks.base import Objective
from keras_emr.attacks.learned import LearnedAttack
from keras_emr.maximizers import Generator, LearnedMaximizer
from keras_emr.maximizers.preprocessing import PREPROCESSINGS
from tests.golden import reference as ref
from tests.golden.test_attacks import Given

N, SHAPE, H, T, EPSILON = 5, (3, 3, 2), 4, 4, 0.2
CELLS = ("lstm", "rnn")
ODD = ("rms", "sign", "raw", "max_abs")
GENERATORS = ("generator-naive", "generator-gradient", "generator-multistep", "gat")
TOLERANCE = {"float32": 1e-5, "float64": 1e-10}


@contextlib.contextmanager
def floatx(name):
    before = keras.config.floatx()
    keras.config.set_floatx(name)
    try:
        yield
    finally:
        keras.config.set_floatx(before)


@pytest.fixture
def precision(request, monkeypatch):
    """Compute in this precision, also where Keras itself would turn float64 into float32."""
    monkeypatch.delitem(dtypes.BIT64_TO_BIT32_DTYPE, "float64", raising=False)
    with floatx(request.param):
        yield request.param


wide = pytest.mark.parametrize("precision", ["float64"], indirect=True)


# ---------------------------------------------------------------- the reference


class Problem:
    """Logits ``sin(x A + b) C + d``: input gradients turn round within a step or two.

    Some pixels of the images are exactly 0 and 1.
    """

    def __init__(self, seed=0):
        rng = np.random.default_rng(seed)
        self.weights = ref.mlp_weights(rng, math.prod(SHAPE), 6, 3, scale=4.0)
        self.x = rng.uniform(size=(N, *SHAPE)).astype("float32").astype("float64")
        self.x[:, 0, 0], self.x[:, 1, 1] = 0.0, 1.0
        self.y = rng.integers(0, 3, N)
        self.noise = rng.normal(size=self.x.shape)

    def part(self, rows):
        """The same network with some of the examples."""
        other = object.__new__(Problem)
        other.weights = self.weights
        other.x, other.y, other.noise = self.x[rows], self.y[rows], self.noise[rows]
        return other

    def logits(self, xp, x):
        a, b, c, d = self.weights if xp is np else [same_dtype(w, x) for w in self.weights]
        return xp.matmul(xp.sin(xp.matmul(xp.reshape(x, (len(self.x), -1)), a) + b), c) + d

    def value(self, xp, name, x):
        """(N,) objective, differentiable."""
        z = self.logits(xp, x)
        log_p = z - xp.log(xp.sum(xp.exp(z), axis=-1, keepdims=True))
        p = ref.softmax(self.logits(np, self.x)) if name == "kl" else np.eye(3)[self.y]
        if xp is not np:
            p = same_dtype(p, x)
        if name == "kl":
            return xp.sum(p * (xp.log(p) - log_p), axis=-1)
        log_true = xp.sum(p * log_p, axis=-1)
        return -xp.exp(log_true) if name == "probability" else -log_true

    def gradient(self, name, x):
        """NumPy input gradient of the summed objective."""
        a, b, c, _ = self.weights
        p, true = ref.softmax(self.logits(np, x)), np.eye(3)[self.y]
        dz = {
            "cross_entropy": p - true,
            "kl": p - ref.softmax(self.logits(np, self.x)),
            "probability": ref.at(p, self.y)[:, None] * (p - true),
        }[name]
        slope = np.cos(x.reshape(len(x), -1) @ a + b)
        return ((dz @ c.T * slope) @ a.T).reshape(x.shape)

    def objective(self, name="cross_entropy"):
        x, y = ref.tensor(self.x, keras.config.floatx()), ref.tensor(self.y, "int32")
        return Objective(lambda x: self.logits(ops, x), name, x, y)


def same_dtype(array, like):
    return ref.tensor(array, keras.backend.standardize_dtype(like.dtype))


def features(xp, kind, met):
    """What the network sees at a step whose gradients so far are ``met``."""
    g, axes = met[-1], (1, 2, 3)
    if kind == "raw":
        return [g]
    if kind == "sign":
        return [xp.sign(g)]
    if kind == "log_sign":
        size = xp.abs(g)
        large, safe = size >= math.exp(-10), xp.where(size > 0, size, xp.ones_like(g))
        logarithm = xp.where(large, xp.log(safe) / 10, -xp.ones_like(g))
        return [logarithm, xp.where(large, xp.sign(g), math.exp(10) * g)]
    if kind == "adam_ratio":
        age = range(len(met) - 1, -1, -1)
        share = [0.05 * 0.95**k / (1 - 0.95 ** len(met)) for k in age]
        m = sum(s * past for s, past in zip(share, met, strict=True))
        v = sum(s * past**2 for s, past in zip(share, met, strict=True))
        return [m / xp.sqrt(v), g / xp.sqrt(v)]
    if kind == "max_abs":
        return [g / xp.max(xp.abs(g), axis=axes, keepdims=True)]
    return [g / xp.sqrt(xp.mean(g * g, axis=axes, keepdims=True))]


def sigmoid(xp, a):
    return 0.5 * (1 + xp.tanh(0.5 * a))


def recurrent_step(xp, layer, weights, met, memory):
    """One proposal: each coordinate is a row. ``memory``: a list of ``[h, c]``, one per layer."""
    weights, shape = list(weights), met[-1].shape
    u = xp.stack([xp.reshape(f, (-1,)) for f in features(xp, layer["preprocessing"], met)], axis=1)
    if memory is None:
        rest = xp.zeros_like(xp.concatenate([u[:, :1]] * H, axis=1))
        memory = [[rest, rest] for _ in range(layer["layers"])]
    kept = []
    for h, c in memory:
        kernel, recurrent = weights.pop(0), weights.pop(0)
        drive = xp.matmul(u, xp.transpose(kernel)) + xp.matmul(h, xp.transpose(recurrent))
        if layer["use_bias"]:
            drive = drive + xp.transpose(weights.pop(0))
        if layer["cell"] == "lstm":
            i, f, o = (sigmoid(xp, drive[:, k * H : (k + 1) * H]) for k in range(3))
            c = f * c + i * xp.tanh(drive[:, 3 * H :])
            u = o * xp.tanh(c)
        else:
            u = xp.tanh(drive)
        kept.append([u, c])
    step = xp.matmul(u, xp.transpose(weights.pop(0)))
    if layer["use_bias"]:
        step = step + weights.pop(0)
    assert not weights
    step = xp.tanh(step) if layer["output"] == "tanh" else step
    return xp.reshape(step, shape), kept


def generator_step(xp, layer, weights, image, met):
    signal = image
    if layer["reads"] != "image":
        signal = met[-1] / xp.max(xp.abs(met[-1]), axis=(1, 2, 3), keepdims=True)
        if layer["reads"] == "image_gradient":
            signal = xp.concatenate([image, signal], axis=-1)
    for k in range(0, len(weights), 2):
        _, rows, columns, channels = signal.shape
        padded = xp.pad(signal, [(0, 0), (1, 1), (1, 1), (0, 0)])
        total = weights[k + 1]
        for i in range(3):
            for j in range(3):
                window = padded[:, i : i + rows, j : j + columns]
                flat = xp.matmul(xp.reshape(window, (-1, channels)), weights[k][i, j])
                total = total + xp.reshape(flat, (-1, rows, columns, flat.shape[-1]))
        last = k == len(weights) - 2
        signal = xp.tanh(total) if last else xp.maximum(total, xp.zeros_like(total))
    return signal


def unroll(xp, attack, weights, x, noise, gradient):
    """``x'_0 .. x'_T`` and ``g_0 .. g_{T-1}``; ``gradient(t, x'_t)`` gives ``g_t``."""
    layer = attack.maximizer.get_config()
    scale = attack.epsilon if layer["scale"] is None else layer["scale"]
    low, high = np.maximum(x - attack.epsilon, 0), np.minimum(x + attack.epsilon, 1)
    image = np.clip(x + attack.start_noise * noise, low, high)
    stop = ops.stop_gradient
    if xp is not np:
        low, high, image = (ref.tensor(a) for a in (low, high, image))
    else:
        stop = lambda a: a  # noqa: E731
    images, met, memory, latent = [image], [], None, image
    for t in range(attack.steps):
        if attack.bptt_horizon and t and t % attack.bptt_horizon == 0:
            image, latent = stop(image), stop(latent)
            memory = memory and [[stop(h), stop(c)] for h, c in memory]
        met.append(gradient(t, image))
        if isinstance(attack.maximizer, Generator):
            step = generator_step(xp, layer, weights, image, met)
        else:
            step, memory = recurrent_step(xp, layer, weights, met, memory)
        latent = (latent if attack.latent else image) + scale * step
        outside = xp.where(latent <= low, low, high)
        image = xp.where((latent > low) & (latent < high), latent, outside)
        if attack.straight_through and xp is not np:
            image = stop(image) + latent - stop(latent)
        images.append(image)
    return images, met


def objective_of_phi(xp, problem, name, attack, images):
    """``mean_i sum_t w_t l_i(x'_t)``, less the penalty of a generator's steps."""
    rule = attack.step_weights
    numbers = {
        "linear": np.arange(1, attack.steps + 1),
        "uniform": np.ones(attack.steps),
        "last": np.eye(attack.steps)[-1],
    }.get(rule if isinstance(rule, str) else None, rule)
    cost = getattr(attack.maximizer, "power_penalty", 0.0)
    total = 0.0
    for number, before, after in zip(numbers, images, images[1:], strict=False):
        gain = xp.sum(problem.value(xp, name, after)) - cost * xp.sum((after - before) ** 2)
        total = total + float(number) / float(np.sum(numbers)) * gain
    return total / len(problem.x)


# ---------------------------------------------------------------- attacks under test


def randomize(maximizer, seed=3, size=0.5):
    """Random non-zero weights, ``W`` and the biases included; returns them in float64."""
    rng = np.random.default_rng(seed)
    for v in maximizer.variables:
        v.assign(size * rng.normal(size=v.shape).astype("float32"))
    return [np.asarray(ref.numpy(v.value), "float64") for v in maximizer.variables]


def make(layer=None, **options):
    """A recurrent attack with small random weights."""
    layer = {"hidden": H, **(layer or {})}
    options = {"steps": T, "start_noise": 0.1, **options}
    attack = LearnedAttack(EPSILON, maximizer=LearnedMaximizer(**layer), **options)
    return attack, randomize(attack.maximizer, size=0.7 if "use_bias" in layer else 1.5)


def make_generator(name, layer=None, **options):
    layer = {"width": 3, "depth": 1, **(layer or {})}
    maximizer = ke.maximizers.make_maximizer(name, **layer)
    maximizer.build((None, *SHAPE))
    options = {"start_noise": 0.1, **options}
    attack = LearnedAttack.named(name, EPSILON, maximizer=maximizer, **options)
    return attack, randomize(maximizer)


def case(name, problem):
    """``(attack, its weights in float64)``; of recurrent ones about a third of the steps clip."""
    layer, options = CASES[name]
    if layer.get("generator"):
        layer = {key: value for key, value in layer.items() if key != "generator"}
        return make_generator(name.split("/")[0], layer, **options)
    attack, weights = make(layer, **options)
    output = weights[-2] if layer.get("use_bias") else weights[-1]
    output *= 0.05
    if layer.get("use_bias"):
        weights[-1] *= 0.1
    while clipped(attack, weights, problem) < 0.25:
        output *= 1.1
    for variable, value in zip(attack.maximizer.variables, weights, strict=True):
        variable.assign(value)
    weights = [np.asarray(ref.numpy(v.value), "float64") for v in attack.maximizer.variables]
    assert 0.1 < clipped(attack, weights, problem) < 0.5
    return attack, weights


def recorded(attack, weights, problem):
    name = attack.objective or "cross_entropy"
    arguments = problem.x, problem.noise, lambda t, x: problem.gradient(name, x)
    return unroll(np, attack, weights, *arguments)


def clipped(attack, weights, problem):
    """Share of the pixels that are on a bound before the last step (pixels start on it, too)."""
    image = recorded(attack, weights, problem)[0][-2]
    far = np.abs(image - problem.x) > attack.epsilon - 1e-12
    return (far | (image == 0) | (image == 1)).mean()


DEEP = {"layers": 2, "use_bias": True}
CASES = {
    **{f"{c}/{p}": ({"cell": c, "preprocessing": p}, {}) for c in CELLS for p in PREPROCESSINGS},
    **{
        f"{c}/{text}": ({"cell": c, **layer}, options)
        for c in CELLS
        for text, layer, options in [
            ("uniform", {}, {"step_weights": "uniform"}),
            ("last", {}, {"step_weights": "last"}),
            ("custom", {}, {"step_weights": [0, 3, 0.5, 0]}),
            ("horizon-1", {}, {"bptt_horizon": 1}),
            ("horizon-2", {"preprocessing": "adam_ratio"}, {"bptt_horizon": 2}),
            ("horizon-3-latent", {}, {"bptt_horizon": 3, "latent": True}),
            ("latent", {}, {"latent": True}),
            ("straight", {}, {"straight_through": True}),
            ("latent-straight", {}, {"latent": True, "straight_through": True}),
            ("kl", {}, {"objective": "kl"}),
            ("deep", {**DEEP, "preprocessing": "log_sign", "output": "tanh"}, {}),
            ("deep-adam", {**DEEP, "preprocessing": "adam_ratio", "scale": 0.05}, {}),
            ("default-noise", {}, {"start_noise": 0.001}),
        ]
    },
    **{name: ({"generator": True}, {}) for name in GENERATORS},
    "generator-multistep/3": ({"generator": True}, {"steps": 3, "step_weights": "linear"}),
    "generator-gradient/power": ({"generator": True, "power_penalty": 2.0}, {"steps": 2}),
    "gat/kl": ({"generator": True}, {"objective": "kl", "steps": 2}),
    "gat/scale": ({"generator": True, "scale": 0.05}, {}),
}
# Every case in float64; what differs in kind also in float32.
IN_FLOAT32 = [n for n in CASES if n.split("/")[-1] in (*PREPROCESSINGS, "kl", "deep", *GENERATORS)]


def learned(attack, problem):
    """``(x_adv, value, gradients)`` of the library, as NumPy float64."""
    objective = problem.objective(attack.objective or "cross_entropy")
    dtype = keras.config.floatx()
    drawn = (ref.tensor(problem.noise, dtype),)
    x_adv, value, gradients = attack.meta_gradient(objective, ref.tensor(problem.x, dtype), drawn)
    for g in gradients:
        assert keras.backend.standardize_dtype(g.dtype) == dtype
    return [np.asarray(ref.numpy(a), "float64") for a in (x_adv, value, *gradients)]


@functools.cache
def expected(name, seed):
    """The same by autodiff through the loss, ``g_t`` recorded beforehand; always in float64."""
    problem = Problem(seed)
    attack, weights = case(name, problem)
    objective = attack.objective or "cross_entropy"
    images, met = recorded(attack, weights, problem)

    def of_phi(*weights):
        arguments = problem.x, problem.noise, lambda t, x: ref.tensor(met[t])
        again, _ = unroll(ops, attack, weights, *arguments)
        return objective_of_phi(ops, problem, objective, attack, again)

    gradients = ref.gradients(of_phi, *weights)
    return [images[-1], problem.value(np, objective, images[-1]), *gradients]


def assert_relative(got, want, tolerance):
    """Relative to the largest entry of each array."""
    overall = max(np.abs(w).max() for w in want)
    for g, w in zip(got, want, strict=True):
        assert g.shape == w.shape and np.abs(w).max() > 1e-4 * overall
        assert np.abs(g - w).max() <= tolerance * np.abs(w).max()


@pytest.mark.parametrize(
    "precision, name",
    [("float64", n) for n in CASES]
    + [pytest.param("float32", n, marks=pytest.mark.slow) for n in IN_FLOAT32],
    indirect=["precision"],
)
def test_meta_gradient_is_autodiff_through_the_loss(precision, name):
    problem = Problem()
    with floatx("float64"):
        want_x, want_value, *want = expected(name, 0)
    x_adv, value, *gradients = learned(case(name, problem)[0], problem)
    np.testing.assert_allclose(x_adv, want_x, atol=TOLERANCE[precision])
    assert_relative([value, *gradients], [want_value, *want], TOLERANCE[precision])


@wide
@pytest.mark.parametrize(
    "name", ["lstm/rms", "rnn/latent", "lstm/kl", "lstm/deep", "rnn/deep-adam", "gat"]
)
def test_meta_gradient_is_the_finite_difference_with_recorded_gradients(precision, name):
    """Nothing is differentiated here by any library; recorded ``g_t`` do not move with phi."""
    problem = Problem(seed=1)
    attack, weights = case(name, problem)
    objective = attack.objective or "cross_entropy"
    _, met = recorded(attack, weights, problem)
    for i, got in enumerate(learned(attack, problem)[2:]):

        def of_phi(array, i=i):
            moved = [array if j == i else w for j, w in enumerate(weights)]
            arguments = problem.x, problem.noise, lambda t, x: met[t]
            images, _ = unroll(np, attack, moved, *arguments)
            return objective_of_phi(np, problem, objective, attack, images)

        want = ref.finite_difference(of_phi, weights[i], h=1e-5)
        assert np.abs(got - want).max() < 1e-6 * np.abs(want).max()


@wide
def test_options_that_must_change_the_gradient_do(precision):
    """So that the comparisons above have something to compare."""
    found = {}
    for name in (
        "rms",
        "uniform",
        "last",
        "horizon-1",
        "latent",
        "straight",
        "kl",
        "default-noise",
    ):
        found[name] = np.concatenate([g.ravel() for g in expected(f"lstm/{name}", 0)[2:]])
    names = list(found)
    for i, a in enumerate(names):
        for b in names[:i]:
            assert np.abs(found[a] - found[b]).max() > 1e-5 * np.abs(found[a]).max(), (a, b)


class Shift(keras.layers.Layer):
    """Step ``w * pattern``: a maximizer whose projection can be followed by hand."""

    reads_gradient, scale = True, None

    def __init__(self, pattern):
        super().__init__(dtype="float32")
        self.pattern = pattern
        self.w = self.add_weight(shape=(), initializer="ones")
        self.built = True

    def initial_state(self, x):
        return ()

    def call(self, image, gradient, state):
        return self.w * ref.tensor(self.pattern, "float32"), state

    def penalty(self, step):
        return 0.0


@pytest.mark.parametrize("straight", [False, True])
def test_pixels_that_end_on_a_bound_exactly_pass_no_gradient(straight):
    """Backends disagree about the derivative of clipping at a tie (1, 0.5 or 0)."""
    #         pixel, step in units of 1/4, passes
    pixels = [
        (0.5, 1.0, False),  # lands on x + epsilon
        (0.5, -1.0, False),  # lands on x - epsilon
        (0.5, 0.5, True),
        (0.5, -0.5, True),
        (0.5, 2.0, False),  # beyond
        (0.0, 0.0, False),  # stays on 0
        (1.0, 0.0, False),  # stays on 1
        (0.125, -0.5, False),  # lands on 0
        (0.875, 0.5, False),  # lands on 1
        (0.125, 0.5, True),
        (0.0, 0.5, True),
        (1.0, 0.5, False),
    ]
    values, pattern, passes = (
        np.array(c, float).reshape(1, 3, 4, 1) for c in zip(*pixels, strict=True)
    )
    slopes = np.random.default_rng(0).uniform(1, 2, size=(1, 3, 4, 1))
    attack = LearnedAttack(
        0.25, maximizer=Shift(pattern), steps=1, start="none", straight_through=straight
    )

    def logits(x):  # cross-entropy whose input gradient is known: two classes
        z = ops.sum(ref.tensor(slopes, "float32") * x, axis=(1, 2, 3))
        return ops.stack([0.0 * z, z], axis=-1)

    x = ref.tensor(values, "float32")
    objective = Objective(logits, "cross_entropy", x, ref.tensor([0], "int32"))
    x_adv, _, (gradient,) = attack.meta_gradient(objective, x, ())
    moved = np.clip(
        values + 0.25 * pattern, np.maximum(values - 0.25, 0), np.minimum(values + 0.25, 1)
    )
    np.testing.assert_array_equal(ref.numpy(x_adv), moved)
    g = slopes / (1 + np.exp(-(slopes * moved).sum()))
    want = (g * 0.25 * pattern * (1 if straight else passes)).sum()
    np.testing.assert_allclose(ref.numpy(gradient), want, rtol=1e-5)


# ---------------------------------------------------------------- the network


@pytest.mark.parametrize("hidden", [1, 10, 20])
def test_parameter_counts(hidden):
    h = hidden

    def count(**options):
        return LearnedMaximizer(hidden=h, **options).count_params()

    pair = {"preprocessing": "log_sign"}
    assert count(cell="rnn") == h**2 + 2 * h
    assert count(cell="rnn", use_bias=True) == h**2 + 3 * h + 1
    assert count(cell="lstm") == 4 * (h + h**2) + h
    assert count(cell="lstm", use_bias=True) == 4 * (h + h**2) + h + 4 * h + 1
    assert count(cell="rnn", **pair) == h**2 + 3 * h
    assert count(cell="lstm", use_bias=True, **pair) == 4 * (2 * h + h**2 + h) + h + 1
    assert count(cell="lstm", layers=2, use_bias=True, preprocessing="adam_ratio") == (
        4 * (2 * h + h**2 + h) + 4 * (2 * h**2 + h) + h + 1
    )
    assert count(cell="rnn", layers=3) == h + h**2 + 2 * 2 * h**2 + h


def test_parameter_counts_of_the_defaults():
    assert LearnedMaximizer(cell="rnn").count_params() == 120
    assert LearnedMaximizer().count_params() == 450
    assert ke.LearnedAttack(0.1).maximizer.cell == "lstm"
    assert LearnedMaximizer(cell="rnn").describe()["parameters"] == 120


def gradients_at_random(steps=3, seed=5, zeros=True):
    rng = np.random.default_rng(seed)
    met = [rng.normal(size=(N, *SHAPE)) * 10.0 ** rng.integers(-8, 3, N)[:, None, None, None]]
    for _ in range(steps - 1):
        met.append(met[0] * rng.normal(size=(N, *SHAPE)))
    if zeros:
        for g in met:
            g[:, 0, 1] = 0.0
            g[-1] = 0.0
    return met


def proposals(maximizer, met):
    """Steps for a history of gradients."""
    tensors = [ref.tensor(g, keras.config.floatx()) for g in met]
    state, steps = maximizer.initial_state(tensors[0]), []
    for g in tensors:
        step, state = maximizer.call(g, g, state)
        steps.append(ref.numpy(step).astype("float64"))
    return np.stack(steps)


@wide
@pytest.mark.parametrize("preprocessing", PREPROCESSINGS)
@pytest.mark.parametrize(
    "options", [{"cell": "lstm"}, {"cell": "rnn"}, {"cell": "lstm", "output": "tanh", **DEEP}]
)
def test_proposals_are_those_of_numpy(precision, preprocessing, options):
    """Gradients of 1e-8 and 1e2 side by side."""
    maximizer = LearnedMaximizer(hidden=H, preprocessing=preprocessing, **options)
    weights, met = randomize(maximizer, size=1.0), gradients_at_random(zeros=False)
    layer, memory, want = maximizer.get_config(), None, []
    for t in range(len(met)):
        step, memory = recurrent_step(np, layer, weights, met[: t + 1], memory)
        want.append(step)
    np.testing.assert_allclose(proposals(maximizer, met), want, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("output", ["linear", "tanh"])
@pytest.mark.parametrize("preprocessing", ODD)
def test_rnn_is_odd_in_the_gradients(preprocessing, output):
    maximizer = LearnedMaximizer(
        "rnn", layers=2, hidden=H, preprocessing=preprocessing, output=output
    )
    randomize(maximizer, size=1.0)
    met = gradients_at_random()
    steps, flipped = proposals(maximizer, met), proposals(maximizer, [-g for g in met])
    np.testing.assert_allclose(flipped, -steps, rtol=1e-5, atol=1e-7)
    assert np.abs(steps).max() > 0.1
    # The history counts, so that oddness in it means something.
    assert np.abs(steps[-1] - proposals(maximizer, met[-1:])[0]).max() > 0.01


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("preprocessing", (*ODD, "adam_ratio"))
def test_zero_gradients_give_zero_steps(cell, preprocessing):
    maximizer = LearnedMaximizer(cell, hidden=H, layers=2, preprocessing=preprocessing)
    randomize(maximizer, size=1.0)
    steps = proposals(maximizer, gradients_at_random())
    assert np.isfinite(steps).all()
    assert not steps[:, -1].any() and not steps[:, :, 0, 1].any()  # an example, and a pixel
    assert np.abs(steps[:, :-1, 1]).max() > 0.01


@pytest.mark.parametrize("cell", CELLS)
def test_zero_gradients_move_pixels_with_log_sign_and_biases(cell):
    """Documented exceptions: no gradient is the feature (-1, 0)."""
    zero = [np.zeros((N, *SHAPE))]
    for options in ({"preprocessing": "log_sign"}, {"use_bias": True}):
        maximizer = LearnedMaximizer(cell, hidden=H, **options)
        randomize(maximizer, size=1.0)
        assert np.abs(proposals(maximizer, zero)).min() > 1e-3


def test_lstm_is_not_odd():
    maximizer = LearnedMaximizer("lstm", hidden=H)
    randomize(maximizer, size=1.0)
    met = gradients_at_random()
    assert np.abs(proposals(maximizer, met) + proposals(maximizer, [-g for g in met])).max() > 0.01


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("preprocessing", PREPROCESSINGS)
def test_permuting_pixels_permutes_steps(cell, preprocessing):
    """Channels too: a coordinate knows neither its place nor its neighbours."""
    maximizer = LearnedMaximizer(cell, hidden=H, layers=2, preprocessing=preprocessing)
    randomize(maximizer, size=1.0)
    met, order = gradients_at_random(), np.random.default_rng(1).permutation(math.prod(SHAPE))

    def permuted(a):
        return a.reshape(*a.shape[:-3], -1)[..., order].reshape(a.shape)

    steps = proposals(maximizer, met)
    assert np.abs(permuted(steps) - steps).max() > 0.01
    got = proposals(maximizer, [permuted(g) for g in met])
    np.testing.assert_allclose(got, permuted(steps), rtol=1e-4, atol=1e-6)


# ---------------------------------------------------------------- attacks


def attacks(**options):
    """One of every kind: all preprocessings, both cells, all generators."""
    layers = [{"cell": "lstm", "preprocessing": p} for p in PREPROCESSINGS]
    for layer in [*layers, {"cell": "rnn", "layers": 2, "use_bias": True}]:
        yield "-".join(map(str, layer.values())), make(layer, **{"steps": 3, **options})[0]
    for name in GENERATORS:
        yield name, make_generator(name, **options)[0]


def run(attack, problem):
    """Through ``Attack.__call__``."""
    dtype = keras.config.floatx()

    class Noise(Given):
        def normal(self, shape):
            return ref.tensor(super()._next("normal", shape), dtype)

    objective = problem.objective(attack.objective or "cross_entropy")
    x_adv = attack(objective, ref.tensor(problem.x, dtype), Noise(normals=[problem.noise]))
    return ref.numpy(x_adv).astype("float64")


@pytest.mark.parametrize("latent, size", [(False, 1e-3), (False, 1e3), (True, 30.0)])
def test_images_stay_in_ball_and_box_for_any_weights(latent, size):
    problem = Problem()
    x, noise = (ref.tensor(a, "float32") for a in (problem.x, problem.noise))
    for name, attack in attacks(latent=latent, start_noise=0.5):
        randomize(attack.maximizer, size=size)
        objective = problem.objective(attack.objective or "cross_entropy")
        trained_on, _, gradients = attack.meta_gradient(objective, x, (noise,))
        for x_adv in (run(attack, problem), ref.numpy(trained_on).astype("float64")):
            assert np.isfinite(x_adv).all() and x_adv.min() >= 0 and x_adv.max() <= 1, name
            reach = np.abs(x_adv - problem.x).max()
            assert 0.001 < reach <= EPSILON + 1e-6, name
        assert all(np.isfinite(ref.numpy(g)).all() for g in gradients), name


@wide
def test_an_example_does_not_feel_its_batch(precision):
    """Alone, at another place, with other batch mates."""
    problem = Problem()
    together = np.array([0, 1, 2, 3, 4])
    for name, attack in attacks():
        whole = run(attack, problem)
        assert np.abs(whole - problem.x).max() > 0.01
        for rows in ([2], together[::-1]):
            got = run(attack, problem.part(np.array(rows)))
            np.testing.assert_allclose(got, whole[rows], atol=1e-11, err_msg=name)
        changed = problem.part(together)
        changed.x = problem.x.copy()
        changed.x[3:] = np.random.default_rng(9).uniform(size=changed.x[3:].shape)
        changed.y = problem.y.copy()
        changed.y[3:] = (problem.y[3:] + 1) % 3
        got = run(attack, changed)
        np.testing.assert_allclose(got[:3], whole[:3], atol=1e-11, err_msg=name)


@wide
def test_what_phi_learns_from_a_batch_is_the_mean_over_its_examples(precision):
    """And it learns on the path that the attack takes without learning."""
    # Batches of the same size (nothing to compile anew) that hold everyone twice, together.
    problem, rows = Problem(), (np.array([0, 1, 1, 2, 2]), np.array([0, 3, 3, 4, 4]))
    for name, attack in attacks():
        whole = learned(attack, problem)
        parts = [learned(attack, problem.part(r)) for r in rows]
        for together, *apart in zip(whole[2:], *(p[2:] for p in parts), strict=True):
            want = (apart[0] + apart[1]) / 2
            np.testing.assert_allclose(together, want, rtol=1e-8, atol=1e-12, err_msg=name)
        np.testing.assert_allclose(whole[0], run(attack, problem), atol=1e-12, err_msg=name)


@pytest.mark.parametrize("name", GENERATORS)
def test_a_fresh_generator_is_built_when_it_first_attacks(name):
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input(SHAPE), keras.layers.Flatten(), keras.layers.Dense(3)])
    problem, found = Problem(), []
    y = ops.convert_to_numpy(model(problem.x.astype("float32"))).argmax(-1)
    for build in (False, True):
        attack = LearnedAttack.named(name, EPSILON)
        if build:
            attack.maximizer.build((None, *SHAPE))
        found.append(ke.evaluate_attack(model, attack, problem.x.astype("float32"), y).x_adv)
    np.testing.assert_array_equal(*found)
    assert np.abs(found[0] - problem.x).max() > 1e-3


def test_rnn_without_memory_on_signs_is_pgd():
    """Iterate by iterate: ``W = 0``, step ``s V tanh(U)``."""
    problem, rng = Problem(), np.random.default_rng(2)
    maximizer = LearnedMaximizer("rnn", hidden=H, preprocessing="sign", scale=0.07)
    kernel, output = rng.normal(size=(H, 1)), rng.normal(size=(1, H))
    step = (output @ np.tanh(kernel)).item()
    output *= np.sign(step)
    for v, value in zip(maximizer.variables, (kernel, np.zeros((H, H)), output), strict=True):
        v.assign(value)
    compare_with_pgd(problem, maximizer, 0.07 * abs(step))


@pytest.mark.parametrize("output", ["linear", "tanh"])
def test_the_untrained_rnn_on_signs_is_pgd(output):
    maximizer = LearnedMaximizer("rnn", preprocessing="sign", output=output)
    compare_with_pgd(Problem(), maximizer, 0.25 * EPSILON)


def compare_with_pgd(problem, maximizer, step_size):
    objective, x = problem.objective(), ref.tensor(problem.x, "float32")
    start = ref.tensor(np.random.default_rng(4).uniform(-1, 1, problem.x.shape), "float32")
    ours = LearnedAttack(EPSILON, maximizer=maximizer, steps=5, start="uniform")
    pgd = ke.PGD(EPSILON, steps=5, step_size=step_size, start="uniform")
    state, reference = (a.begin(objective, x, (start,)) for a in (ours, pgd))
    np.testing.assert_array_equal(ref.numpy(state[0]), ref.numpy(reference[0]))
    for _ in range(5):
        before = ref.numpy(state[0])
        state, reference = (
            attack.step(objective, x, s) for attack, s in ((ours, state), (pgd, reference))
        )
        np.testing.assert_allclose(ref.numpy(state[0]), ref.numpy(reference[0]), atol=1e-6)
        assert np.abs(ref.numpy(state[0]) - before).max() == pytest.approx(step_size, rel=1e-3)


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("preprocessing", PREPROCESSINGS)
@pytest.mark.parametrize("layers", [1, 2])
def test_untrained_maximizers_go_uphill(cell, preprocessing, layers):
    """A first feature of 1 (of a pair: the signed one) gives a step of ``initial_step``."""
    if layers == 1 and preprocessing in ODD:
        maximizer = LearnedMaximizer(cell, preprocessing=preprocessing, initial_step=0.3)
        one = [np.ones((1, 2, 2, 1))]
        np.testing.assert_allclose(proposals(maximizer, one), 0.3, rtol=1e-5)
    maximizer = LearnedMaximizer(cell, layers=layers, preprocessing=preprocessing)
    problem = Problem()
    attack = LearnedAttack(0.02, maximizer=maximizer, steps=5)
    before = problem.value(np, "cross_entropy", problem.x)
    after = problem.value(np, "cross_entropy", run(attack, problem))
    assert (after > before).all()


# ---------------------------------------------------------------- cost


@pytest.mark.parametrize(
    "name, options, gradients, passes",
    [
        ("lstm", {"steps": 6}, 7, 7),
        ("rnn", {"steps": 6, "step_weights": "last"}, 7, 7),
        ("lstm", {"steps": 1}, 2, 2),
        ("lstm", {"steps": 6, "bptt_horizon": 2, "latent": True}, 7, 7),
        ("lstm", {"steps": 3, "step_weights": [1, 0, 0]}, 3, 4),  # g_3 is of no use
        ("generator-naive", {}, 1, 1),
        ("generator-naive", {"steps": 3, "step_weights": "last"}, 1, 3),
        ("generator-gradient", {}, 2, 2),
        ("generator-multistep", {}, 3, 3),
        ("gat", {}, 2, 2),
    ],
)
def test_input_gradients_are_counted(monkeypatch, name, options, gradients, passes):
    """T + 1 a batch, and nothing else runs the network."""
    problem, counted, forward = Problem(), [], []
    attack, _ = (
        make({"cell": name}, **options) if name in CELLS else make_generator(name, **options)
    )
    original = backend.value_and_grad

    def counting(fn, x):
        counted.append(1)
        return original(fn, x)

    monkeypatch.setattr(backend, "value_and_grad", counting)
    logits = problem.logits
    problem.logits = lambda xp, x: forward.append(1) or logits(xp, x)
    learned(attack, problem)
    assert (len(counted), len(forward)) == (gradients, passes)


class Wide:
    """A convolution whose activations are 256 times the image."""

    channels, shape = 256, (8, 8, 1)

    def __init__(self, n=4):
        rng = np.random.default_rng(0)
        self.kernel = ref.tensor(rng.normal(size=(3, 3, 1, self.channels)) * 0.3, "float32")
        self.head = ref.tensor(rng.normal(size=(self.channels, 3)) * 0.1, "float32")
        self.x = ref.tensor(rng.uniform(size=(n, *self.shape)), "float32")
        self.y = ref.tensor(rng.integers(0, 3, n), "int32")
        self.noise = ref.tensor(rng.normal(size=(n, *self.shape)), "float32")
        self.map = 4 * n * 64 * self.channels  # bytes of one activation map

    def logits(self, x):
        maps = ops.tanh(ops.conv(x, self.kernel, padding="same"))
        return ops.matmul(ops.mean(maps, axis=(1, 2)), self.head)

    def meta_gradient(self, steps, x, noise):
        attack = LearnedAttack(EPSILON, maximizer=LearnedMaximizer(hidden=2), steps=steps)
        objective = Objective(self.logits, "cross_entropy", x, self.y)
        return attack.meta_gradient(objective, x, (noise,))


def test_activations_of_the_network_do_not_pile_up_with_the_steps():
    """Between T = 4 and T = 8 the peak grows by less than one activation map a step."""
    measure = {"torch": peak_on_torch, "jax": peak_on_jax}.get(keras.backend.backend())
    if measure is None:
        pytest.skip("TensorFlow reports no peak of memory on the CPU")
    problem = Wide()
    short, long = (measure(problem, steps) for steps in (4, 8))
    assert short > problem.map  # the network is in the measure
    assert (long - short) / 4 < 0.25 * problem.map


def peak_on_torch(problem, steps):
    """Most bytes that autograd keeps at a time."""
    import torch

    held = {"now": 0, "peak": 0}

    class Kept:
        def __init__(self, tensor):
            self.tensor, self.size = tensor, tensor.numel() * tensor.element_size()
            held["now"] += self.size
            held["peak"] = max(held["peak"], held["now"])

        def __del__(self):
            held["now"] -= self.size

    with torch.autograd.graph.saved_tensors_hooks(Kept, lambda kept: kept.tensor):
        problem.meta_gradient(steps, problem.x, problem.noise)
    return held["peak"]


def peak_on_jax(problem, steps):
    """Bytes of the compiled function's temporaries."""
    import jax

    compiled = jax.jit(lambda x, noise: problem.meta_gradient(steps, x, noise))
    memory = compiled.lower(problem.x, problem.noise).compile().memory_analysis()
    if memory is None:
        pytest.skip("this jaxlib has no memory analysis")
    return memory.temp_size_in_bytes
