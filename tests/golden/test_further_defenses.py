"""LBGAT, MMA, free AT, the hypersphere head and shares of classes, against float64 NumPy."""

import keras
import numpy as np
import pytest
from keras import layers, ops

import keras_emr as ke
from keras_emr import losses
from keras_emr.attacks import boundary_search
from keras_emr.attacks.base import Objective
from keras_emr.data import TrainBatches
from keras_emr.defenses import get_defense
from keras_emr.errors import UserError
from keras_emr.models.hypersphere import hypersphere_head
from keras_emr.network import Network
from keras_emr.sampling import StreamSampler
from keras_emr.training.optimizers import SGD
from tests.builders import images
from tests.golden import reference as ref

N, K = 12, 5
RNG = np.random.default_rng(0)
Y = RNG.integers(0, K, N)
CLEAN, ADVERSARIAL, TEACHER = (3 * RNG.normal(size=(N, K)) for _ in "abc")
SHARES = RNG.dirichlet(np.ones(K), N)
LABELS = ref.tensor(Y, "int32")


def close(got, want, rtol=1e-9):
    np.testing.assert_allclose(ref.numpy(got), want, rtol=rtol, atol=1e-12)


def margin_off(logits, margin):
    return logits - margin * np.eye(K)[Y]


# ---------------------------------------------------------------- losses


@pytest.mark.parametrize("beta", [0.0, 6.0])
def test_lbgat(beta):
    """Values, and gradients of all three logits: nothing is detached."""

    def reference(clean, adversarial, teacher):
        gap = ((adversarial - teacher) ** 2).mean(-1)
        return gap + ref.cross_entropy(Y, teacher) + beta * ref.kl(clean, adversarial)

    given = (CLEAN, ADVERSARIAL, TEACHER)
    defense = get_defense("lbgat", beta=beta)
    a, b, t = map(ref.tensor, given)
    close(defense.loss(LABELS, a, b, 0, teacher=t), reference(*given))

    def total(a, b, t):
        return ops.sum(defense.loss(LABELS, a, b, 0, teacher=t))

    for i, found in enumerate(ref.gradients(total, *given)):

        def moved(logits, i=i):
            return reference(*given[:i], logits, *given[i + 1 :]).sum()

        want = ref.finite_difference(moved, given[i])
        np.testing.assert_allclose(found, want, rtol=1e-5, atol=1e-7)


def test_mma():
    counted = (np.arange(N) % 3 > 0).astype("float32")
    defense = get_defense("mma")
    got = defense.loss(LABELS, ref.tensor(CLEAN), ref.tensor(ADVERSARIAL), 0, ref.tensor(counted))
    attacked, clean = ref.cross_entropy(Y, ADVERSARIAL), ref.cross_entropy(Y, CLEAN)
    close(got, (2 * counted * attacked + clean) / 3)
    got = get_defense("mma", clean_weight=0.0).loss(LABELS, CLEAN, ref.tensor(ADVERSARIAL), 0)
    close(got, attacked)


def test_soft_margin():
    others = ADVERSARIAL.copy()
    others[np.arange(N), Y] = -np.inf
    want = np.log(np.exp(others).sum(-1)) - ref.at(ADVERSARIAL, Y)
    close(losses.soft_margin(LABELS, ref.tensor(ADVERSARIAL)), want)
    (slope,) = ref.gradients(lambda z: ops.sum(losses.soft_margin(LABELS, z)), ADVERSARIAL)
    np.testing.assert_allclose(ref.at(slope, Y), -1.0)
    np.testing.assert_allclose(slope.sum(-1), 0.0, atol=1e-12)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_cross_entropy_of_shares(smoothing):
    target = (1 - smoothing) * SHARES + smoothing / (K - 1) * (1 - SHARES)
    want = -(target * ref.log_softmax(CLEAN)).sum(-1)
    shares = ref.tensor(SHARES)
    close(losses.cross_entropy(shares, ref.tensor(CLEAN), smoothing), want)
    certain = losses.cross_entropy(ref.tensor(np.eye(K)[Y]), ref.tensor(CLEAN), smoothing)
    close(certain, ref.numpy(losses.cross_entropy(LABELS, ref.tensor(CLEAN), smoothing)))
    np.testing.assert_array_equal(ref.numpy(losses.dominant(shares)), SHARES.argmax(-1))


@pytest.mark.parametrize("name", ["standard", "at", "trades"])
def test_defenses_take_shares(name):
    a, b = ref.tensor(CLEAN), ref.tensor(ADVERSARIAL)
    seen = ADVERSARIAL if name == "at" else CLEAN
    want = -(SHARES * ref.log_softmax(seen)).sum(-1)
    want = want + (6 * ref.kl(CLEAN, ADVERSARIAL) if name == "trades" else 0)
    close(get_defense(name).loss(ref.tensor(SHARES), a, b, 0), want)


def test_margin_of_the_true_class():
    """Of the classification term alone: neither KL nor MART's weight sees it."""
    a, b, m = ref.tensor(CLEAN), ref.tensor(ADVERSARIAL), 3.0
    entropy = ref.cross_entropy(Y, margin_off(CLEAN, m))
    close(get_defense("standard", logit_margin=m).loss(LABELS, a, None, 0), entropy)
    want = entropy + 6 * ref.kl(CLEAN, ADVERSARIAL)
    close(get_defense("trades", logit_margin=m).loss(LABELS, a, b, 0), want)
    want = ref.cross_entropy(Y, margin_off(ADVERSARIAL, m))
    close(get_defense("at", logit_margin=m).loss(LABELS, None, b, 0), want)
    want = ref.boosted(Y, margin_off(ADVERSARIAL, m)) + 5 * ref.weighted_kl(Y, CLEAN, ADVERSARIAL)
    close(get_defense("mart", logit_margin=m).loss(LABELS, a, b, 0), want)


# ---------------------------------------------------------------- the search of MMA


@pytest.mark.parametrize(("norm", "dual", "within"), [("linf", 1, 1e-3), ("l2", 2, 0.1)])
def test_boundary_of_a_linear_model(norm, dual, within):
    """Two classes, z = (0, <w, x> + b): the margin is |z| / ||w||_dual, as far as [0, 1] allows.

    From a random start, which L2's steps do not quite leave behind.
    """
    rng = np.random.default_rng(3)
    w, b = rng.normal(size=(4, 4, 1)).astype("float32"), 0.1
    x = rng.uniform(0.4, 0.6, (9, 4, 4, 1)).astype("float32")
    score = (x * w).sum((1, 2, 3)) + b
    y = (score > 0).astype("int32")
    weights = ops.convert_to_tensor(w)

    def logits(x):
        value = ops.sum(x * weights, axis=(1, 2, 3)) + b
        return ops.stack([ops.zeros_like(value), value], axis=-1)

    objective = Objective(logits, "soft_margin", x, ops.convert_to_tensor(y))
    attack = ke.PGD(0.3, norm=norm, steps=5, start="uniform")
    radius = np.linspace(0.02, 0.3, 9).astype("float32")
    found, distance = boundary_search.search(
        attack,
        objective,
        ops.convert_to_tensor(x),
        StreamSampler(7),
        ops.convert_to_tensor(radius),
        1.0,
        16,
    )
    found, distance = ref.numpy(found), ref.numpy(distance)
    want = np.abs(score) / np.linalg.norm(w.ravel(), dual)
    assert 0 < found.min() and found.max() < 1  # the box takes no part
    assert (distance > want - 3e-5).all()
    np.testing.assert_allclose(distance, want, rtol=within, atol=3e-5)
    reached = np.linalg.norm((found - x).reshape(9, -1), {1: np.inf, 2: 2}[dual], axis=1)
    np.testing.assert_allclose(reached, distance, rtol=1e-4)


def one_layer():
    """4x4 images to 3 logits, with the same weights on every backend: classes by brightness."""
    stack = [keras.Input((4, 4, 1)), layers.Flatten(), layers.Dense(3)]
    model = keras.Sequential(stack)
    noise, k = np.random.default_rng(4).normal(size=(16, 3)), np.arange(3)
    for variable, value in zip(
        model.weights, (12 * k / 16 + 0.3 * noise, -3.0 * k**2), strict=True
    ):
        variable.assign(value)
    return model


def test_mma_attacks_the_correct_and_remembers_margins():
    x, y = images(n=24, side=4)
    y[::4] = (y[::4] + 1) % 3
    model = one_layer()
    robust = ke.RobustClassifier(model, ke.MMA(examples=40), ke.PGD(0.1, steps=4))
    logits = model(x)
    right = ref.numpy(losses.soft_margin(ref.tensor(y, "int32"), logits)) < 0
    assert 8 < right.sum() < 21
    number = np.arange(24, dtype="int32")[::-1] + 7
    given = (ops.convert_to_tensor(v) for v in (x, y, number.copy()))
    x_adv, counted = map(ref.numpy, robust.find_boundary(Network(model), *given))
    remembered = ref.numpy(robust.remembered)
    np.testing.assert_array_equal(x_adv[~right], x[~right])
    np.testing.assert_array_equal(remembered[number][~right], 0)
    margins = remembered[number][right]
    assert margins.min() > 0 and margins.max() <= 0.105
    moved = np.abs(x_adv - x).max((1, 2, 3))[right]
    assert (moved <= margins + 1e-6).all()
    np.testing.assert_array_equal(counted, ~right | (remembered[number] < 0.1))
    assert not remembered[:7].any() and not remembered[31:].any()


# ---------------------------------------------------------------- free AT


def test_free_steps_by_hand():
    """Softmax regression: both gradients of one pass, from batch to batch."""
    x, y = images(n=16, side=4)
    x[:3] = 0.0  # ties of the clip at 0, whose gradient differs by backend: only its sign counts
    model, epsilon, rate = one_layer(), 0.2, 0.5
    w, b = (ref.numpy(v).astype("float64") for v in model.trainable_variables)
    robust = ke.RobustClassifier(
        model, ke.FreeAdversarialTraining(batch_size=8, replays=2), ke.PGD(epsilon)
    )
    robust.compile(SGD(rate, momentum=0.0))
    batches = TrainBatches(x, y, 8, seed=1, replays=2)
    assert len(batches) == 4
    robust.fit(batches, shuffle=False, verbose=0)
    delta = np.zeros((8, 16))
    for i in range(4):
        pixels, labels = batches[i]
        if i % 2:
            np.testing.assert_array_equal(pixels, batches[i - 1][0])
        moved = pixels.reshape(8, 16) + delta
        inside = (moved >= 0) & (moved <= 1)
        seen = np.clip(moved, 0, 1)
        error = (ref.softmax(seen @ w + b) - np.eye(3)[labels]) / 8
        slope = inside * (error @ w.T)
        delta = np.clip(delta + epsilon * np.sign(slope), -epsilon, epsilon)
        w, b = w - rate * seen.T @ error, b - rate * error.sum(0)
    np.testing.assert_allclose(ref.numpy(robust.perturbation).reshape(8, 16), delta, atol=1e-6)
    for found, want in zip(model.trainable_variables, (w, b), strict=True):
        np.testing.assert_allclose(ref.numpy(found), want, atol=2e-6)


# ---------------------------------------------------------------- hypersphere


def on_sphere():
    stack = [keras.Input((4, 4, 1)), layers.Flatten(), layers.Dense(6, "relu"), layers.Dense(3)]
    return hypersphere_head(keras.Sequential(stack), 10.0)


def lengths(model):
    return np.linalg.norm(ref.numpy(model.get_layer("cosines").kernel), axis=0)


def test_hypersphere_head(tmp_path):
    """Scaled cosines, by Keras's own layers."""
    x, _ = images(side=4)
    model = on_sphere()
    np.testing.assert_allclose(lengths(model), 1, rtol=1e-5)
    w, b = (ref.numpy(v).astype("float64") for v in model.weights[:2])
    f = np.maximum(x.reshape(-1, 16) @ w + b, 0)
    want = 10 * f / np.linalg.norm(f, axis=1, keepdims=True) @ ref.numpy(model.weights[2])
    np.testing.assert_allclose(ref.numpy(model(x)), want, rtol=1e-3, atol=1e-3)
    model.save(tmp_path / "m.keras")
    loaded = keras.saving.load_model(tmp_path / "m.keras", compile=False)
    assert all(type(layer).__module__.startswith("keras.") for layer in loaded.layers)
    np.testing.assert_array_equal(ref.numpy(loaded(x)), ref.numpy(model(x)))


@pytest.mark.slow
def test_weights_stay_on_the_sphere():
    """After steps at perturbed weights, and in the average."""
    x, y = images(side=4)
    robust = ke.RobustClassifier(
        on_sphere(),
        ke.AdversarialTraining(logit_margin=2.0),
        ke.PGD(0.1, steps=1),
        averaging=ke.EMA(0.9),
        weight_perturbation=ke.AWP(0.05),
    )
    robust.compile(SGD(0.1, weight_decay=1e-2))
    robust.fit(x, y, batch_size=16, shuffle=False, verbose=0)
    np.testing.assert_allclose(lengths(robust.model), 1, rtol=1e-5)
    with robust.averaged():
        np.testing.assert_allclose(lengths(robust.model), 1, rtol=1e-5)


@pytest.mark.slow
def test_a_blank_image_has_a_gradient():
    """Features of length zero: finite, whatever was learned from the others."""
    keras.utils.set_random_seed(1)
    stack = [keras.Input((2, 2, 1)), layers.Flatten(), layers.Dense(4, "relu"), layers.Dense(3)]
    model = hypersphere_head(keras.Sequential(stack))
    x, y = ops.zeros((2, 2, 2, 1)), ref.tensor([0, 1], "int32")
    for slope in ref.weight_gradients(model, lambda: ops.sum(losses.cross_entropy(y, model(x)))):
        assert np.isfinite(slope).all()


def test_a_head_needs_a_dense_layer():
    model = hypersphere_head(one_layer())
    with pytest.raises(UserError, match=r"Functional model\. Received: .* ends in Rescaling"):
        hypersphere_head(model)
    with pytest.raises(UserError, match="must be above 0"):
        hypersphere_head(one_layer(), 0.0)


# ---------------------------------------------------------------- all together


def sequence(name):
    """(defense, attack, y) of a short run."""
    x, y = images(side=4)
    attack = ke.PGD(0.1, steps=2)
    if name == "mma":
        y = {"label": y, "number": np.arange(48, dtype="int32")}
        return get_defense("mma", examples=48, trials=3), attack, x, y
    if name == "free-at":
        return get_defense("free-at", batch_size=16), attack, x, y
    return get_defense(name), attack, x, np.eye(3, dtype="float32")[y] if name == "trades" else y


@pytest.mark.parametrize(
    "name", ["mma", *(pytest.param(name, marks=pytest.mark.slow) for name in ("lbgat", "free-at"))]
)
def test_a_saved_classifier_goes_on_bit_for_bit(tmp_path, name):
    """With EMR; teacher, margins and perturbation are in the file."""
    defense, attack, x, y = sequence(name)
    robust = ke.RobustClassifier(
        one_layer(),
        defense,
        attack,
        [ke.EffectiveMarginRegularizer(0.01)],
    )
    robust.compile(keras.optimizers.Adam(1e-2))

    def fit(model, epoch):
        options = {"batch_size": 16, "shuffle": False, "verbose": 0}
        return model.fit(x, y, initial_epoch=epoch, epochs=epoch + 1, **options).history

    before = fit(robust, 0)
    assert np.isfinite(before["loss"][0]) and before["emr"][0] > 0
    robust.save(tmp_path / "c.keras")
    loaded = keras.models.load_model(tmp_path / "c.keras")
    assert repr(loaded.defense) == repr(robust.defense)
    assert fit(robust, 1) == fit(loaded, 1)
    assert len(robust.weights) == len(loaded.weights)
    for a, b in zip(robust.weights, loaded.weights, strict=True):
        np.testing.assert_array_equal(ref.numpy(a), ref.numpy(b))
    extra = {"mma": robust.remembered, "free-at": robust.perturbation, "lbgat": robust.teacher}
    kept = extra[name]
    assert np.abs(ref.numpy(kept.weights[0] if name == "lbgat" else kept)).max() > 0
    if name == "lbgat":
        assert len(robust.trainable_variables) == 4 and len(robust.model.weights) == 2


@pytest.mark.slow
def test_training_on_certain_shares_is_training_on_labels():
    results = []
    for soft in (False, True):
        defense, attack, x, shares = sequence("trades")
        robust = ke.RobustClassifier(one_layer(), defense, attack)
        robust.compile(keras.optimizers.Adam(1e-2))
        y = shares if soft else shares.argmax(-1)
        results.append(robust.fit(x, y, batch_size=16, shuffle=False, verbose=0).history)
    for name, value in results[0].items():
        np.testing.assert_allclose(value, results[1][name], rtol=1e-6)


@pytest.mark.parametrize(
    ("defense", "attack", "said"),
    [
        ("mart", ke.PGD(0.1), "loss is not defined. Received: defense='mart'"),
        ("mma", ke.PGD(0.1), "loss is not defined. Received: defense='mma'"),
        (ke.TRADES(logit_margin=1.0), ke.PGD(0.1), "loss is not defined.* logit margin"),
        ("at", ke.PGD(0.1, objective="margin"), "objective is not defined. Received: .*'margin'"),
    ],
)
def test_shares_are_refused_where_they_mean_nothing(defense, attack, said):
    x, y = images(side=4)
    robust = ke.RobustClassifier(one_layer(), defense, attack)
    robust.compile()
    with pytest.raises(UserError, match=said):
        robust.fit(x, np.eye(3)[y], verbose=0)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"defense": "at", "teacher": True}, "'at' has no teacher"),
        ({"defense": "mma", "weight_perturbation": ke.AWP()}, "AWP is not defined for .*'mma'"),
        ({"defense": "mma", "attack": ke.APGD(0.1)}, "searches along PGD's direction.*'apgd'"),
        (
            {"defense": get_defense("free-at", batch_size=4), "attack": ke.PGD(0.1, "l2")},
            "'free-at' is one of Linf. Received: norm='l2'",
        ),
    ],
)
def test_what_does_not_go_together(options, said):
    options = {"attack": ke.PGD(0.1), **options}
    if options.get("teacher"):
        options["teacher"] = one_layer()
    with pytest.raises(UserError, match=said):
        ke.RobustClassifier(one_layer(), **options)
