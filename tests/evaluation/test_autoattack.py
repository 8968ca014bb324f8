"""AutoAttack: accounting, independence of the batch size, resuming, functions, randomness."""

import keras
import numpy as np
import pytest
from keras import layers, ops

import keras_emr as ke
from keras_emr.attacks import ATTACKS
from keras_emr.evaluation import journal as journal_module
from keras_emr.evaluation.attack_run import AttackRun
from keras_emr.evaluation.autoattack import VERSIONS, OutOfTime, version_attacks
from keras_emr.evaluation.session import InfeasibleAttack
from keras_emr.evaluation.target import KerasTarget
from tests.builders import images, network

X, Y = images(40, classes=4)
EPSILON = 0.1


@pytest.fixture(scope="module")
def model():
    trained = network(batch_norm=False, classes=4)
    trained.compile(
        keras.optimizers.Adam(2e-2),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    trained.fit(X, Y, epochs=30, verbose=0)
    return trained


def quick(norm="linf", epsilon=EPSILON):
    """The standard suite with few steps."""
    steps = {"apgd-ce": 3, "apgd-t": 3, "fab-t": 3, "square": 10}
    pairs = version_attacks("standard", epsilon, norm)
    for name, attack in pairs:
        attack.steps = steps[name]
    return pairs


def weak(epsilon=EPSILON):
    """Two attacks that each break some examples and leave some."""
    return [
        ke.PGD(epsilon, steps=1, step_size=0.02, start="none"),
        ke.PGD(epsilon, steps=4, restarts=2),
    ]


def right(model, x, y=Y):
    return ops.convert_to_numpy(model(x)).argmax(1) == y


@pytest.mark.parametrize("norm,epsilon", [("linf", EPSILON), ("l2", 0.5)])
def test_accounting(model, norm, epsilon):
    labels = Y.copy()
    labels[:5] = (labels[:5] + 1) % 4  # wrong to begin with
    suite = ke.AutoAttack(epsilon, norm, attacks=quick(norm, epsilon))
    result = suite.run(model, X, labels, batch_size=16)
    np.testing.assert_array_equal(result.correct, right(model, X, labels))
    np.testing.assert_array_equal(result.robust, right(model, result.x_adv, labels))
    assert result.robust_accuracy == result.robust.sum() / 40 < result.accuracy
    untouched = result.robust | ~result.correct
    np.testing.assert_array_equal(result.x_adv[untouched], X[untouched])
    np.testing.assert_array_equal(result.broken_by >= 0, result.correct & ~result.robust)
    assert result.complete and result.max_perturbation <= epsilon + 1e-6
    left = int(result.correct.sum())
    for number, entry in enumerate(result.attacks):
        assert entry["attacked"] == left
        assert entry["broken"] == (result.broken_by == number).sum()
        left -= entry["broken"]
        assert entry["robust_accuracy"] == left / 40


def test_versions_are_the_authors():
    def told(version, norm="linf"):
        return [
            (name, a.steps, a.runs(10), getattr(a, "objective", None), getattr(a, "eot", 1))
            for name, a in version_attacks(version, 8 / 255, norm)
        ]

    ce, dlr = "cross_entropy", "dlr"
    standard = [
        ("apgd-ce", 100, 1, ce, 1),
        ("apgd-t", 100, 9, dlr, 1),
        ("fab-t", 100, 9, None, 1),
        ("square", 5000, 1, None, 1),
    ]
    assert told("standard") == told("standard", "l2") == standard
    assert told("plus") == [
        ("apgd-ce", 100, 5, ce, 1),
        ("apgd-dlr", 100, 5, dlr, 1),
        ("fab", 100, 5, None, 1),
        ("square", 5000, 1, None, 1),
        *standard[1:3],
    ]
    assert told("rand") == [("apgd-ce", 100, 1, ce, 20), ("apgd-dlr", 100, 1, dlr, 20)]
    assert list(VERSIONS) == ["standard", "plus", "rand"]
    square = dict(version_attacks("standard", 0.3, "linf"))["square"]
    assert (square.p_init, square.rescale) == (0.8, False)


def test_the_batch_size_changes_nothing(model):
    suite = ke.AutoAttack(EPSILON, attacks=quick(), seed=3)
    small, large = (suite.run(model, X, Y, batch_size=size) for size in (7, 40))
    np.testing.assert_array_equal(small.robust, large.robust)
    np.testing.assert_array_equal(small.broken_by, large.broken_by)
    np.testing.assert_allclose(small.x_adv, large.x_adv, atol=1e-5)
    assert 0 < small.robust.sum() < small.correct.sum()


class Killed(Exception):
    pass


@pytest.mark.parametrize("after", [1, 3, 4])
def test_a_killed_evaluation_goes_on_where_it_stopped(model, tmp_path, monkeypatch, after):
    monkeypatch.setattr(journal_module, "_EVERY", 0.0)
    attacked = []
    batch = AttackRun.attack_batch

    def counted(self, x, y, index, *rest):
        if len(attacked) == after and not resumed:
            raise Killed
        attacked.append((self.attack.steps, rest[0], tuple(index)))
        return batch(self, x, y, index, *rest)

    monkeypatch.setattr(AttackRun, "attack_batch", counted)
    suite = ke.AutoAttack(EPSILON, attacks=weak(), seed=1)
    resumed = True
    whole = suite.run(model, X, Y, batch_size=16)
    order, attacked[:] = list(attacked), []
    resumed = False
    state = tmp_path / "deep" / "state.npz"
    with pytest.raises(Killed):
        suite.run(model, X, Y, batch_size=16, state=state)
    resumed = True
    again = suite.run(model, X, Y, batch_size=16, state=state)
    assert attacked == order  # nothing twice, nothing left out
    for name in ("correct", "robust", "x_adv", "broken_by"):
        np.testing.assert_array_equal(getattr(again, name), getattr(whole, name))
    strip = [{k: v for k, v in e.items() if k != "seconds"} for e in again.attacks]
    assert strip == [{k: v for k, v in e.items() if k != "seconds"} for e in whole.attacks]
    attacked[:] = []
    done = suite.run(model, X, Y, state=state)  # all of it is in the file
    assert not attacked and done.complete and list(tmp_path.iterdir()) == [state.parent]
    np.testing.assert_array_equal(done.robust, whole.robust)


def test_a_state_of_another_evaluation_is_refused_by_name(model, tmp_path):
    state = tmp_path / "state.npz"

    def run(model=model, x=X, epsilon=EPSILON, attacks=None, **options):
        suite = ke.AutoAttack(epsilon, attacks=attacks or weak(epsilon), **options)
        return suite.run(model, x, Y, state=state)

    run()
    before = state.read_bytes()
    other = keras.models.clone_model(model)
    for name, changed in (
        ("model", {"model": other}),
        ("data", {"x": X * 0.99}),
        ("epsilon", {"epsilon": 0.2}),
        ("seed", {"seed": 7}),
        ("attacks", {"attacks": [ke.FGSM(EPSILON)]}),
    ):
        with pytest.raises(ke.UserError, match=f"another evaluation, {name} differs"):
            run(**changed)
    assert state.read_bytes() == before
    state.write_bytes(before[:200])
    with pytest.raises(ke.UserError, match="state: cannot be read"):
        run()


def test_a_full_disk_leaves_the_last_state_whole(model, tmp_path, monkeypatch):
    monkeypatch.setattr(journal_module, "_EVERY", 0.0)
    state = tmp_path / "state.npz"
    suite = ke.AutoAttack(EPSILON, attacks=weak())
    writes = []
    replace = journal_module.os.replace

    def full(source, target):
        writes.append(target)
        if len(writes) > 2:
            raise OSError(28, "No space left on device")
        replace(source, target)

    monkeypatch.setattr(journal_module.os, "replace", full)
    with pytest.raises(ke.UserError, match=r"state: cannot be written .No space left"):
        suite.run(model, X, Y, batch_size=16, state=state)
    monkeypatch.undo()
    assert list(tmp_path.iterdir()) == [state]
    resumed = suite.run(model, X, Y, batch_size=16, state=state)
    np.testing.assert_array_equal(resumed.robust, suite.run(model, X, Y).robust)


def test_out_of_time_keeps_what_was_found(model, tmp_path):
    suite = ke.AutoAttack(EPSILON, attacks=weak())
    with pytest.raises(OutOfTime) as stopped:
        suite.run(model, X, Y, batch_size=16, state=tmp_path / "s.npz", time_budget=0.0)
    partial = stopped.value.result
    assert not partial.complete and partial.robust.sum() > 0
    whole = suite.run(model, X, Y, batch_size=16, state=tmp_path / "s.npz")
    np.testing.assert_array_equal(whole.robust, suite.run(model, X, Y).robust)


def test_a_function_is_attacked_where_no_gradient_is_needed(model):
    square = ATTACKS.get("square")(EPSILON, steps=30)

    def logits(x):
        return ops.convert_to_numpy(model(x))

    def softmax(x):
        return ops.convert_to_numpy(ops.softmax(model(x)))

    suite = ke.AutoAttack(EPSILON, attacks=[square])
    expected = suite.run(model, X, Y)
    for function in (logits, softmax):
        result = suite.run(function, X, Y)
        np.testing.assert_array_equal(result.robust, expected.robust)
    assert expected.robust.sum() < expected.correct.sum()
    assert expected.attacks[0]["queries"] > 40
    with pytest.raises(ke.UserError, match=r"attack 'apgd-ce' needs gradients|attack 'apgd' needs"):
        ke.AutoAttack(EPSILON).run(logits, X, Y)
    with pytest.raises(ke.UserError, match="needs scores"):
        suite.run(lambda x: logits(x).argmax(1), X, Y, classes=4)
    with pytest.raises(ke.UserError, match="classes=K"):
        suite.run(lambda x: logits(x).argmax(1), X, Y)


def test_transfer_counts_what_the_target_gets_wrong(model):
    surrogate = network(batch_norm=False, classes=4, seed=5)
    surrogate.compile(
        keras.optimizers.Adam(2e-2),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    surrogate.fit(X, Y, epochs=30, verbose=0)
    attack = ATTACKS.get("transfer")(ke.PGD(0.15, steps=5), [surrogate], batch_size=16)
    result = ke.evaluate_attack(lambda x: ops.convert_to_numpy(model(x)), attack, X, Y)
    np.testing.assert_array_equal(result.robust, right(model, result.x_adv))
    white = ke.evaluate_attack(model, ke.PGD(0.15, steps=5), X, Y)
    assert white.robust.sum() <= result.robust.sum() < result.correct.sum()
    assert result.queries == result.correct.sum()


def test_few_classes_are_noted():
    x, y = images(12, classes=2)
    pairs = [(n, a) for n, a in quick() if n.startswith("apgd")]
    dlr = ATTACKS.get("apgd")(EPSILON, steps=3, objective="dlr")
    for classes, text in ((2, "two classes: the DLR loss"), (3, "three classes: the targeted DLR")):
        result = ke.AutoAttack(EPSILON, attacks=[*pairs, ("apgd-dlr", dlr)]).run(
            network(batch_norm=False, classes=classes), x, y
        )
        assert any(note.startswith(text) for note in result.notes)
        assert any("targets of 9" in note for note in result.notes)
        assert [entry["name"] for entry in result.attacks] == ["apgd-ce", "apgd-t", "apgd-dlr"]


class Noisy(layers.Layer):
    """Noise at inference, too."""

    def __init__(self, **options):
        super().__init__(**options)
        self.generator = keras.random.SeedGenerator(0)

    def call(self, x):
        return x + 0.3 * keras.random.normal(ops.shape(x), seed=self.generator)


def test_gradients_of_a_random_model_are_averaged():
    """EOT: the mean gradient of a noisy quadratic is that at the mean, to 1/sqrt(passes)."""
    keras.utils.set_random_seed(1)
    model = keras.Sequential(
        [
            keras.Input((6, 6, 1)),
            Noisy(),
            layers.Flatten(),
            layers.Lambda(lambda x: ops.stack([-ops.sum(x**2, -1), 0 * x[:, 0], 0 * x[:, 1]], -1)),
        ]
    )
    x = np.full((64, 6, 6, 1), 0.5, "float32")
    y = np.zeros(64, "int32")
    errors = []
    for eot in (1, 4):
        attack = ke.APGD(0.1, steps=1, objective="margin", start="none", eot=eot)
        run = AttackRun(model, attack, 64)
        states = list(run.states(*run.prepare(x, y, np.arange(64), 0, 0)))
        gradient = ops.convert_to_numpy(states[0].gradient)
        errors.append(np.abs(gradient - 2 * x).mean())
        assert not np.array_equal(
            ops.convert_to_numpy(states[0].gradient), ops.convert_to_numpy(states[1].gradient)
        )
    # |2 n|, n of scale 0.3: mean 2 * 0.3 * sqrt(2 / pi) = 0.479.
    assert errors[0] == pytest.approx(0.479, rel=0.1)
    assert errors[1] == pytest.approx(0.479 / 2, rel=0.1)


def test_a_random_model_is_asked_anew_each_time():
    model = keras.Sequential([keras.Input((6, 6, 1)), Noisy(), layers.Flatten(), layers.Dense(3)])
    target = KerasTarget(model)
    assert np.abs(target.predict(X) - target.predict(X)).max() > 0.01


def test_bad_suites_are_refused(model):
    for options, text in (
        ({"version": "strong"}, "unknown AutoAttack version"),
        ({"norm": "l1"}, "unknown norm"),
        ({"attacks": []}, "no attacks"),
        ({"attacks": [ke.PGD(0.2)]}, "another threat model"),
        ({"attacks": [ke.PGD(0.05, "l2")]}, "another threat model"),
    ):
        with pytest.raises(ke.UserError, match=text):
            ke.AutoAttack(EPSILON, **options)
    with pytest.raises(ke.UserError, match="nothing that can be attacked"):
        ke.AutoAttack(EPSILON, attacks=weak()).run(3, X, Y)


def test_an_attack_outside_its_ball_stops_the_evaluation(model):
    class TooFar(ke.PGD):
        def step(self, objective, x, state):
            return (state[0] + 0.02,)

    with pytest.raises(InfeasibleAttack, match="left its threat model"):
        ke.AutoAttack(0.05, attacks=[TooFar(0.05, steps=5, start="none")]).run(model, 0.5 * X, Y)


@pytest.mark.parametrize("attack", ["apgd-t"])
def test_attacks_for_evaluation_only_are_refused_in_training(attack):
    with pytest.raises(ke.UserError, match="runs inside a training step"):
        ke.RobustClassifier(network(), "at", attack=ATTACKS.get(attack)(0.1))
