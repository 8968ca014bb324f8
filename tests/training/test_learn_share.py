"""A maximizer that learns from a share of each batch, while all of it is attacked."""

import keras
import numpy as np
import pytest
from keras import ops

import keras_emr as ke
from keras_emr import backend
from keras_emr.attacks.base import Objective
from keras_emr.attacks.learned import LearnedAttack
from keras_emr.errors import UserError
from keras_emr.network import Network
from keras_emr.sampling import StreamSampler
from tests.builders import images, network

X, Y = images(n=12)


def attack(share, name="lstm", **options):
    options = {"steps": 3, "learn_share": share, **options}
    return LearnedAttack.named(name, 0.2, **options)


def meta(model, learned, rows=slice(None), objective="cross_entropy", drawn=None):
    """Images, objective and phi's gradients for some rows of the batch."""
    x, y = ops.convert_to_tensor(X[rows]), ops.convert_to_tensor(Y[rows])
    goal = Objective(Network(model).frozen(), objective, x, y)
    if drawn is None:
        seed = keras.random.SeedGenerator(3)
        drawn = learned.draw(ops.convert_to_tensor(X), StreamSampler(seed))
    found = learned.meta_gradient(goal, x, tuple(d[rows] for d in drawn))
    return [keras.tree.map_structure(ops.convert_to_numpy, part) for part in found], drawn


@pytest.mark.parametrize(
    "share, learners",
    [
        (0.3, 4),
        (0.01, 1),
        *(pytest.param(*p, marks=pytest.mark.slow) for p in ((0.25, 3), (0.99, 12))),
    ],
)
def test_phi_learns_from_the_first_images_and_all_are_attacked(share, learners):
    model = network()
    learned = attack(share)
    (images_found, value, gradients), drawn = meta(model, learned)
    (everything, _, _), _ = meta(model, attack(1.0), drawn=drawn)
    (_, first, wanted), _ = meta(model, attack(1.0), slice(0, learners), drawn=drawn)
    np.testing.assert_allclose(images_found, everything, atol=1e-6)
    assert value.shape == (learners,)
    np.testing.assert_allclose(value, first, rtol=1e-5)
    assert max(np.abs(g).max() for g in wanted) > 0
    for got, want in zip(gradients, wanted, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "options",
    [{"latent": True}, {"bptt_horizon": 1}, {"step_weights": [1, 2, 0]}, {"steps": 1}],
    ids=lambda options: next(iter(options)),
)
def test_with_every_form_of_the_steps(options):
    model = network()
    learned = attack(0.3, **options)
    (everything, _, gradients), drawn = meta(model, learned)
    whole = attack(1.0, maximizer=learned.maximizer, **options)
    (alone, _, wanted), _ = meta(model, whole, slice(0, 4), drawn=drawn)
    np.testing.assert_allclose(everything[:4], alone, atol=1e-6)
    assert max(np.abs(g).max() for g in wanted) > 0
    for got, want in zip(gradients, wanted, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-6)


@pytest.mark.skipif(backend.chain is None, reason="jax only")
@pytest.mark.parametrize("share", [1.0, 0.3])
@pytest.mark.parametrize("bptt_horizon", [None, 2])
def test_replayed_steps_have_the_gradient_of_the_unrolled_ones(monkeypatch, share, bptt_horizon):
    model, lengths = network(), []
    learned = attack(share, steps=5, bptt_horizon=bptt_horizon)
    chain = backend.chain

    def counted(step, state, records):
        lengths.append(len(records[0]))
        return chain(step, state, records)

    monkeypatch.setattr(backend, "chain", counted)
    replayed, drawn = meta(model, learned)
    assert lengths == [4]
    monkeypatch.setattr(backend, "chain", None)
    unrolled, _ = meta(model, learned, drawn=drawn)
    for got, want in zip(*map(keras.tree.flatten, (replayed, unrolled)), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["rnn", "generator-multistep", "generator-naive"])
def test_every_maximizer_can(name):
    options = {"steps": 3} if name == "rnn" else {"steps": None}
    options = {k: v for k, v in options.items() if v is not None}
    model, learned = network(), LearnedAttack.named(name, 0.2, learn_share=0.5, **options)
    (found, value, gradients), drawn = meta(model, learned, objective="kl")
    assert found.shape == X.shape and value.shape == (6,)
    whole = LearnedAttack.named(name, 0.2, maximizer=learned.maximizer, **options)
    (_, _, wanted), _ = meta(model, whole, slice(0, 6), "kl", drawn)
    for got, want in zip(gradients, wanted, strict=True):
        assert np.abs(got - want).max() <= 0.02 * np.abs(want).max() + 1e-7


def test_joint_training_learns_and_it_is_saved(tmp_path):
    robust = ke.RobustClassifier(network(), "at", attack=attack(0.5), seed=1)
    robust.compile(keras.optimizers.SGD(0.1))
    before = [ops.convert_to_numpy(v) for v in robust.maximizer.variables]
    history = robust.fit(X, Y, batch_size=6, epochs=2, verbose=0, shuffle=False).history
    assert np.isfinite(history["inner_loss"]).all() and history["skipped_updates"] == [0, 0]
    after = [ops.convert_to_numpy(v) for v in robust.maximizer.variables]
    moved = [np.abs(a - b).max() for a, b in zip(after, before, strict=True)]
    assert max(moved) > 0
    robust.save(tmp_path / "classifier.keras")
    loaded = keras.saving.load_model(tmp_path / "classifier.keras")
    assert loaded.attack.learn_share == 0.5


@pytest.mark.parametrize("share", [0, -0.5, 1.5])
def test_a_share_out_of_range_is_refused(share):
    with pytest.raises(UserError, match="learn_share"):
        attack(share)
