"""Training phi (the maximizer) and theta (the classifier) together."""

import keras
import numpy as np
import pytest
from keras import ops

import keras_emr as ke
from keras_emr.attacks.base import Objective
from keras_emr.attacks.learned import LearnedAttack
from keras_emr.maximizers import LearnedMaximizer
from keras_emr.network import Network
from keras_emr.sampling import StreamSampler
from tests.builders import assert_same, images, network, snapshot

X, Y = images(n=24)
EPSILON, RATE, SIZE = 0.2, 0.5, 12
TORCH = keras.backend.backend() == "torch"


@pytest.fixture(scope="module", autouse=True)
def quick_compilation():
    """Two dozen small programs: on JAX they take longer to optimise than to run."""
    if keras.backend.backend() != "jax":
        yield
        return
    import jax

    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def lstm(seed=1, **options):
    """With weights that use the memory: the untrained ``W`` is zero."""
    maximizer = LearnedMaximizer(hidden=3, **options)
    rng = np.random.default_rng(seed)
    for v in maximizer.variables:
        v.assign(ops.convert_to_numpy(v.value) + 0.2 * rng.normal(size=v.shape))
    return maximizer


def classifier(defense="at", model=None, theta=None, phi=None, maximizer=None, **options):
    attack = {"steps": 2, **options.pop("attack", {})}
    if not isinstance(maximizer, str):
        attack = LearnedAttack(EPSILON, maximizer=maximizer or lstm(), **attack)
    else:
        attack.pop("steps")
        attack = LearnedAttack.named(maximizer, EPSILON, **attack)
    robust = ke.RobustClassifier(model or network(), defense, attack=attack, seed=4, **options)
    robust.compile(
        theta or keras.optimizers.SGD(0.1),
        maximizer_optimizer=phi or keras.optimizers.SGD(RATE),
    )
    return robust


def fit(robust, rows=slice(0, SIZE), **options):
    options = {"batch_size": SIZE, "shuffle": False, "verbose": 0, **options}
    history = robust.fit(X[rows], Y[rows], **options).history
    return {key: values[-1] for key, values in history.items()}


def phi_of(robust):
    return snapshot(robust.maximizer.variables)


def slots_of(robust):
    return snapshot(robust.maximizer_optimizer.variables)


def meta_gradient(model, attack, rows=slice(0, SIZE), earlier_draws=0):
    """What a batch's attack teaches phi: ``(value, gradients)`` outside of any training step."""
    x, y = ops.convert_to_tensor(X[rows]), ops.convert_to_tensor(Y[rows])
    name = attack.objective or "cross_entropy"
    objective = Objective(Network(model).frozen(), name, x, y)
    sampler = StreamSampler(keras.random.SeedGenerator(4))
    for _ in range(earlier_draws + 1):
        drawn = attack.draw(x, sampler)
    _, value, gradients = attack.meta_gradient(objective, x, drawn)
    return ops.convert_to_numpy(value), [ops.convert_to_numpy(g) for g in gradients]


def assert_close(a, b, tolerance=1e-6):
    assert len(a) == len(b) > 0
    for one, other in zip(a, b, strict=True):
        np.testing.assert_allclose(one, other, rtol=10 * tolerance, atol=tolerance)


def moved(before, after):
    return all((a != b).any() for a, b in zip(before, after, strict=True))


# ---------------------------------------------------------------- one step, by hand


@pytest.fixture(scope="module")
def steps():
    """One batch from the same theta and phi, in every way."""
    found = {}
    for name, options in {
        "joint": {},
        "adam": {"theta": keras.optimizers.Adam(1e-2)},
        "frozen": {"maximizer_update": "frozen"},
        "alternating": {"maximizer_update": "alternating"},
    }.items():
        robust = classifier("trades", **options)
        watched = {"validation_data": (X[:5], Y[:5])} if name in ("joint", "frozen") else {}
        logs = fit(robust, **watched)
        found[name] = robust, logs
    return found


def untouched():
    return classifier("trades")


def test_joint_phi_ascends_its_own_gradient(steps):
    """Plain SGD: ``phi + rate * gradient``, at the classifier of before the step."""
    start, (robust, logs) = untouched(), steps["joint"]
    value, gradients = meta_gradient(start.model, start.attack)
    want = [p + RATE * g for p, g in zip(phi_of(start), gradients, strict=True)]
    assert_close(phi_of(robust), want)
    assert max(np.abs(RATE * g).max() for g in gradients) > 1e-3
    assert logs["inner_loss"] == pytest.approx(value.mean(), rel=1e-4)
    assert logs["skipped_updates"] == 0


def test_theta_does_not_notice_that_phi_learns(steps):
    """Weights and BatchNorm statistics: phi's lesson is no part of theta's gradient."""
    start = untouched()
    trained = [snapshot(steps[name][0].model.variables) for name in ("frozen", "joint")]
    # A bias ahead of BatchNorm has no gradient but rounding, about 1e-7 after the step.
    assert_close(*trained)
    assert_close(trained[0], snapshot(steps["alternating"][0].model.variables))
    weights = [snapshot(m.trainable_variables) for m in (start.model, steps["joint"][0].model)]
    assert moved(*weights)


def test_phi_does_not_notice_how_theta_learns(steps):
    assert_same(phi_of(steps["joint"][0]), phi_of(steps["adam"][0]))


def test_alternating_phi_sees_the_updated_classifier(steps):
    start, (robust, logs) = untouched(), steps["alternating"]
    value, gradients = meta_gradient(robust.model, start.attack, earlier_draws=1)
    want = [p + RATE * g for p, g in zip(phi_of(start), gradients, strict=True)]
    assert_close(phi_of(robust), want)
    assert logs["inner_loss"] == pytest.approx(value.mean(), rel=1e-4)
    # Neither the old classifier nor the first noise give the same.
    for wrong in (
        meta_gradient(start.model, start.attack, earlier_draws=1)[1],
        meta_gradient(robust.model, start.attack)[1],
    ):
        assert max(np.abs(RATE * (a - b)).max() for a, b in zip(wrong, gradients, strict=True)) > (
            1e-5
        )


def test_frozen_phi_stays(steps):
    assert_same(phi_of(untouched()), phi_of(steps["frozen"][0]))
    assert not any(steps["frozen"][1].get(key) for key in ("inner_loss", "skipped_updates"))


def test_logs(steps):
    shared = {"loss", "accuracy", "robust_accuracy"}
    validation = {f"val_{name}" for name in shared}
    for name in ("joint", "frozen"):
        logs = steps[name][1]
        learning = {"inner_loss", "skipped_updates", "val_learned_loss", "val_referee_loss"}
        learning = set() if name == "frozen" else learning
        assert set(logs) == shared | validation | learning, name


def test_phi_is_not_theta(steps):
    robust = steps["joint"][0]
    phi = {id(v) for v in robust.maximizer.variables}
    assert not phi & {id(v) for v in robust.trainable_variables}
    assert phi <= {id(v) for v in robust.variables}


def test_the_attack_touches_phi_alone(steps):
    """Eagerly, outside of ``fit``: BatchNorm statistics, theta and its slots stay."""
    robust = steps["adam"][0]
    kept = [*robust.model.variables, *robust.optimizer.variables]
    before, phi = snapshot(kept), phi_of(robust)
    x, y = ops.convert_to_tensor(X[:SIZE]), ops.convert_to_tensor(Y[:SIZE])
    found = robust.find_adversarial(Network(robust.model), x, y, training=True)
    assert 0.01 < np.abs(ops.convert_to_numpy(found) - X[:SIZE]).max() <= EPSILON + 1e-6
    assert_same(before, snapshot(kept))
    assert moved(phi, phi_of(robust))


# ---------------------------------------------------------------- phi alone


class Linear:
    """Two classes, ``z_1 - z_0 = w . x``; images so far from 0 and 1 that the box is idle."""

    def __init__(self, channels=1, side=4, epsilon=0.1):
        rng = np.random.default_rng(0)
        self.w = rng.normal(size=(side, side, channels))
        kernel = np.stack([-self.w.ravel() / 2, self.w.ravel() / 2], axis=1)
        dense = keras.layers.Dense(2)
        shape = (side, side, channels)
        self.model = keras.Sequential([keras.Input(shape), keras.layers.Flatten(), dense])
        self.model.set_weights([kernel, np.zeros(2)])
        self.epsilon = epsilon
        self.x = rng.uniform(0.35, 0.65, size=(32, *shape)).astype("float32")
        self.y = (self.signal(self.x) > 0).astype("int32")  # all correct

    def signal(self, x):
        return (x * self.w).sum((1, 2, 3))

    def loss(self, x):
        return np.log1p(np.exp(-np.where(self.y == 1, 1, -1) * self.signal(x)))

    def rise(self, x_adv):
        """Mean loss increase as a share of the largest possible: ``w . x`` moves eps ``|w|_1``."""
        toward = np.where(self.y == 1, -1.0, 1.0)[:, None, None, None] * np.sign(self.w)
        clean, worst = self.loss(self.x), self.loss(self.x + self.epsilon * toward)
        return (self.loss(x_adv) - clean).mean() / (worst - clean).mean()

    def attacked(self, maximizer, **options):
        attack = LearnedAttack(self.epsilon, maximizer=maximizer, **{"steps": 3, **options})
        return ke.evaluate_attack(self.model, attack, self.x, self.y).x_adv

    def last_images(self, maximizer, **options):
        """Every example's last iterate (``evaluate_attack`` keeps what broke it)."""
        attack = LearnedAttack(self.epsilon, maximizer=maximizer, **{"steps": 3, **options})
        x, y = ops.convert_to_tensor(self.x), ops.convert_to_tensor(self.y)
        objective = Objective(Network(self.model).frozen(), "cross_entropy", x, y)
        return ops.convert_to_numpy(attack(objective, x, StreamSampler(3))).astype("float64")


@pytest.fixture(scope="module")
def warmed():
    """A maximizer that first walks downhill, trained on a linear model."""
    problem = Linear()
    maximizer = LearnedMaximizer(hidden=4)
    maximizer.output_kernel.assign(-ops.convert_to_numpy(maximizer.output_kernel.value))
    before = problem.rise(problem.last_images(maximizer))
    robust = ke.RobustClassifier(
        problem.model, "at", attack=LearnedAttack(0.1, maximizer=maximizer, steps=3)
    )
    robust.compile(
        keras.optimizers.SGD(0.1, momentum=0.9),
        maximizer_optimizer=keras.optimizers.Adam(5e-2, global_clipnorm=1.0),
    )
    robust.optimizer.build(robust.trainable_variables)
    kept = snapshot([*problem.model.variables, *robust.optimizer.variables])
    history = robust.fit_maximizer(problem.x, problem.y, batch_size=16, epochs=25, verbose=0)
    after_kept = snapshot([*problem.model.variables, *robust.optimizer.variables])
    return problem, maximizer, before, history.history, (kept, after_kept), robust


def test_training_phi_alone_turns_descent_into_ascent(warmed):
    problem, _, before, history, _, _ = warmed
    assert before < -0.1
    clean = problem.loss(problem.x).mean()
    assert history["inner_loss"][0] < clean < history["inner_loss"][-1]
    assert set(history) == {"inner_loss", "skipped_updates"}
    assert not any(history["skipped_updates"])


def test_a_short_training_reaches_the_closed_form_on_a_linear_model(warmed):
    problem, maximizer, _, _, _, _ = warmed
    assert 0.95 <= problem.rise(problem.last_images(maximizer)) <= 1 + 1e-5


def test_training_phi_alone_leaves_the_classifier(warmed):
    assert_same(*warmed[4])


def test_a_trained_maximizer_serves_elsewhere(warmed):
    """Four times the steps, a smaller ball, three channels: one coordinate is like another."""
    _, maximizer, _, _, _, _ = warmed
    for options, channels, epsilon in [
        ({"steps": 12}, 1, 0.1),
        ({}, 1, 0.03),
        ({"steps": 6}, 3, 0.1),
    ]:
        problem = Linear(channels, side=5, epsilon=epsilon)
        assert problem.rise(problem.last_images(maximizer, **options)) > 0.9
        attack = LearnedAttack(epsilon, maximizer=maximizer, **{"steps": 3, **options})
        result = ke.evaluate_attack(problem.model, attack, problem.x, problem.y)
        pgd = ke.evaluate_attack(problem.model, ke.PGD(epsilon), problem.x, problem.y)
        assert result.accuracy == 1 and result.max_perturbation <= epsilon + 1e-6
        assert result.robust_accuracy <= pgd.robust_accuracy + 0.05
    assert problem.rise(problem.last_images(lstm())) < 0.9  # the training was needed


def test_training_goes_on_with_both_after_phi_alone(warmed):
    problem, maximizer, _, _, (_, before), robust = warmed
    copy = LearnedMaximizer.from_config(maximizer.get_config())
    copy.set_weights(maximizer.get_weights())
    robust.fit(problem.x, problem.y, batch_size=16, verbose=0)
    assert moved(before[:1], snapshot(problem.model.variables[:1]))
    assert moved(copy.get_weights(), maximizer.get_weights())
    problem.model.set_weights(before[:2])
    maximizer.set_weights(copy.get_weights())


def test_phi_alone_in_a_network_with_batch_norm():
    """Weights, statistics and slots to the bit; the first step is ``+ rate * gradient``."""
    robust = classifier("trades", theta=keras.optimizers.Adam(1e-2))
    robust.optimizer.build(robust.trainable_variables)
    kept = [*robust.model.variables, *robust.optimizer.variables, robust.epoch]
    before, phi = snapshot(kept), phi_of(robust)
    _, gradients = meta_gradient(robust.model, robust.attack)
    robust.fit_maximizer(X[:SIZE], Y[:SIZE], batch_size=SIZE, shuffle=False, verbose=0)
    assert_same(before, snapshot(kept))
    assert_close(phi_of(robust), [p + RATE * g for p, g in zip(phi, gradients, strict=True)])


@pytest.mark.parametrize("options", [{"attack": ke.PGD(0.1)}, {"maximizer_update": "frozen"}])
def test_phi_alone_needs_a_phi_that_learns(options):
    robust = ke.RobustClassifier(network(), "at", **{"attack": LearnedAttack(0.1), **options})
    robust.compile("sgd")
    with pytest.raises(ke.UserError, match=r"no maximizer to train\. Received: "):
        robust.fit_maximizer(X, Y, verbose=0)


# ---------------------------------------------------------------- combinations


def assert_trains(robust, **options):
    theta, phi = snapshot(robust.trainable_variables), phi_of(robust)
    logs = fit(robust, slice(None), **options)
    assert all(np.isfinite(value) for value in logs.values())
    assert logs["skipped_updates"] == 0 and logs["inner_loss"] != 0
    assert moved(theta, snapshot(robust.trainable_variables))
    assert any((a != b).any() for a, b in zip(phi, phi_of(robust), strict=True))
    for values in (snapshot(robust.variables), slots_of(robust)):
        assert all(np.isfinite(v).all() for v in values)
    return logs


@pytest.mark.parametrize("defense", ["at", "trades", "mart", "mail-at", "mail-trades", "mail-mart"])
def test_every_defense_trains_with_emr(defense):
    robust = classifier(
        defense, phi=keras.optimizers.Adam(1e-2), regularizers=[ke.EffectiveMarginRegularizer(0.1)]
    )
    assert robust.attack.objective == ("kl" if "trades" in defense else "cross_entropy")
    assert robust.attack.maximizer is robust.maximizer
    assert assert_trains(robust)["emr"] > 0


@pytest.mark.parametrize("name", ["generator-naive", "generator-gradient", "generator-multistep"])
def test_generators_train(name):
    assert_trains(classifier("at", maximizer=name))


@pytest.mark.parametrize("policy", ["float32", "mixed_float16"])
def test_what_else_keras_can_do(policy):
    """Gradient accumulation, loss scaling, several batches per call."""
    keras.config.set_dtype_policy(policy)
    try:
        model = network()
        theta = keras.optimizers.SGD(0.1, gradient_accumulation_steps=2)
        if policy == "mixed_float16":
            theta = keras.optimizers.LossScaleOptimizer(
                keras.optimizers.SGD(0.1), initial_scale=8.0
            )
        cell = lstm(cell="rnn") if policy == "float32" else lstm()
        robust = classifier("trades", model=model, theta=theta, maximizer=cell)
    finally:
        keras.config.set_dtype_policy("float32")
    robust.compile(
        theta,
        maximizer_optimizer=keras.optimizers.SGD(RATE),
        **({} if TORCH else {"steps_per_execution": 2}),
    )
    assert robust.maximizer.compute_dtype == "float32"
    assert_trains(robust)


# ---------------------------------------------------------------- what is not finite


def test_a_gradient_that_is_not_finite_is_skipped_and_counted(monkeypatch):
    """Phi and its slots are those of before the batch; theta learns as if nothing was wrong."""
    usual = classifier(phi=keras.optimizers.Adam(1e-2))
    fit(usual)
    phi, slots = phi_of(usual), slots_of(usual)
    fit(usual, slice(SIZE, 2 * SIZE))
    assert moved(phi, phi_of(usual))

    original = LearnedAttack.meta_gradient

    def broken(self, objective, x, drawn):
        x_adv, value, gradients = original(self, objective, x, drawn)
        # The second batch is known by its first image.
        here = ops.all(ops.abs(x[0] - ops.convert_to_tensor(X[SIZE])) < 1e-6)
        first = ops.where(here, float("nan"), gradients[0])
        return x_adv, value, [first, *gradients[1:]]

    monkeypatch.setattr(LearnedAttack, "meta_gradient", broken)
    robust = classifier(phi=keras.optimizers.Adam(1e-2))
    logs = fit(robust, slice(0, 2 * SIZE))
    assert logs["skipped_updates"] == 1
    # Two programs, which JAX may round differently; an update is four orders larger.
    assert_close(phi, phi_of(robust), 1e-6)
    assert_close(slots, slots_of(robust), 1e-6)
    assert_close(snapshot(usual.model.variables), snapshot(robust.model.variables), 1e-7)
    assert all(np.isfinite(v).all() for v in snapshot(robust.variables))


# ---------------------------------------------------------------- saved runs


@pytest.mark.parametrize("update, maximizer", [("joint", None), ("alternating", "gat")])
def test_a_loaded_run_continues_bit_for_bit(tmp_path, update, maximizer):
    robust = classifier(
        "trades",
        model=network(dropout=0.3),
        theta=keras.optimizers.Adam(1e-2),
        phi=keras.optimizers.Adam(1e-2, global_clipnorm=1.0),
        maximizer=maximizer,
        maximizer_update=update,
        attack={} if maximizer else {"step_weights": (1.0, 3.0), "bptt_horizon": 1},
    )
    fit(robust, slice(None), epochs=2)
    robust.save(tmp_path / "c.keras")
    loaded = keras.models.load_model(tmp_path / "c.keras")
    assert len(loaded.trainable_variables) == len(loaded.model.trainable_variables)
    assert_same(phi_of(robust), phi_of(loaded))
    assert_same(slots_of(robust), slots_of(loaded))
    assert loaded.attack.maximizer is loaded.maximizer
    assert loaded.attack.weights == robust.attack.weights
    assert loaded.attack.describe() == robust.attack.describe()
    assert loaded.maximizer_optimizer.get_config() == robust.maximizer_optimizer.get_config()
    logs = [fit(r, slice(None), initial_epoch=2, epochs=3) for r in (robust, loaded)]
    assert logs[0] == logs[1]
    for of in (phi_of, slots_of, lambda r: snapshot(r.weights)):
        assert_same(of(robust), of(loaded))
    assert_same(snapshot(robust.optimizer.variables), snapshot(loaded.optimizer.variables))
    assert_same(snapshot([robust.attack_seed.state]), snapshot([loaded.attack_seed.state]))


# ---------------------------------------------------------------- refusals


def test_validation_by_the_learned_attack_is_refused():
    with pytest.raises(ke.UserError, match=r"validation needs .*Received: eval_attack='learned'"):
        ke.RobustClassifier(
            network(), "at", attack=ke.PGD(0.1), eval_attack=LearnedAttack(0.1, maximizer=lstm())
        )
    referee = classifier().eval_attack
    assert isinstance(referee, ke.PGD) and referee.epsilon == EPSILON
    assert referee.objective == "cross_entropy"


@pytest.mark.parametrize(
    "make",
    [
        lambda: LearnedAttack(0.1, steps=0),
        lambda: LearnedAttack(0.1, steps=2.5),
        lambda: LearnedAttack(-0.1),
        lambda: LearnedAttack(0.1, "l2"),
        lambda: LearnedAttack(0.1, maximizer="transformer"),
        lambda: LearnedAttack(0.1, maximizer=keras.layers.Dense(1)),
        lambda: LearnedAttack(0.1, maximizer=3),
        lambda: LearnedAttack(0.1, start="elsewhere"),
        lambda: LearnedAttack(0.1, start_noise=-1),
        lambda: LearnedAttack(0.1, objective="entropy"),
        lambda: LearnedAttack(0.1, step_weights="quadratic"),
        lambda: LearnedAttack(0.1, steps=3, step_weights=[1, 2]),
        lambda: LearnedAttack(0.1, steps=2, step_weights=[0, 0]),
        lambda: LearnedAttack(0.1, steps=2, step_weights=[1, -1]),
        lambda: LearnedAttack(0.1, steps=2, step_weights=[1, float("nan")]),
        lambda: LearnedAttack(0.1, steps=2, step_weights=3),
        lambda: LearnedAttack(0.1, steps=2, step_weights=None),
        lambda: LearnedAttack(0.1, bptt_horizon=0),
        lambda: LearnedAttack(0.1, bptt_horizon=-1),
        lambda: LearnedAttack.named("transformer", 0.1),
        lambda: LearnedMaximizer("gru"),
        lambda: LearnedMaximizer(preprocessing="batch_rms"),
        lambda: LearnedMaximizer(output="relu"),
        lambda: LearnedMaximizer(hidden=0),
        lambda: LearnedMaximizer(layers=0),
        lambda: LearnedMaximizer(scale=-1.0),
        lambda: ke.Generator(reads="labels"),
        lambda: ke.Generator(width=0),
        lambda: ke.Generator(depth=0),
        lambda: ke.Generator(power_penalty=-1.0),
        lambda: ke.RobustClassifier(
            network(), "at", attack=LearnedAttack(0.1), maximizer_update="sometimes"
        ),
        lambda: ke.RobustClassifier(network(), "trades", attack=LearnedAttack(0.1, start="none")),
    ],
)
def test_bad_options_are_one_line(make):
    with pytest.raises(ke.UserError, match="Received: ") as caught:
        make()
    assert "\n" not in str(caught.value)
