"""The gate: what it measures, what it refuses, and how ``trusted`` gets its threshold."""

import shutil
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_emr import UserError, effective_margins
from keras_emr.data.dataset import from_arrays
from keras_emr_serving.export import parity, savedmodel, stages, warmup
from keras_emr_serving.export.parity import ParityError
from keras_emr_serving.export.reference import gate_images, reference
from keras_emr_serving.export.signatures import Served
from keras_emr_serving.export.threshold import choose_threshold, trust_summary
from tests.builders import images, network


def test_logits_are_compared_relative_to_their_scale():
    expected = np.array([[1.0, -200.0], [3.0, 2.0]])
    told = parity.compare_logits(expected, expected + np.array([[0, 0], [0, 1e-3]]))
    assert told["relative_difference"] == pytest.approx(5e-6)
    assert (told["label_flips"], told["images"], told["scale"]) == (0, 2, 200.0)
    told = parity.compare_logits(expected, expected + np.array([[0, 0], [0, 1.5]]))
    assert told["label_flips"] == 1
    told = parity.compare_logits(expected, expected + np.array([[0, 0], [0, np.nan]]))
    assert told["relative_difference"] == np.inf
    assert parity.compare_logits(expected, expected, np.array([0, 1]))["label_flips"] == 1
    zero = np.zeros((2, 2))
    assert parity.compare_logits(zero, zero)["relative_difference"] == 0
    with pytest.raises(ParityError, match=r"Received: logits \(2, 3\)"):
        parity.compare_logits(zero, np.zeros((2, 3)))


def report(difference=0.0, flips=0, outliers=0.0, which="logits"):
    fine = {"relative_difference": 0.0, "label_flips": 0, "images": 1000, "tolerance": 1e-5}
    margins = {"outliers": outliers, "tolerated_outliers": 0.01, "images": 100, "tolerance": 1e-3}
    made = {"logits": fine, "robust_logits": fine, "effective_margins": {"l2": margins}}
    made[which] = {**fine, "relative_difference": difference, "label_flips": flips}
    return made


@pytest.mark.parametrize("which", ["logits", "robust_logits"])
def test_what_the_gate_lets_through(which):
    parity.require_parity(report(1e-5, which=which))
    for bad in (report(1.1e-5, which=which), report(float("nan"), which=which)):
        with pytest.raises(ParityError, match="differs from its source"):
            parity.require_parity(bad)
    with pytest.raises(ParityError, match=r"and 1 labels flip on 1000 images.*nothing is publish"):
        parity.require_parity(report(0.0, 1, which=which))
    parity.require_parity(report(outliers=0.01))
    with pytest.raises(ParityError, match=r"margins \(l2\).*2\.0% of 100 images"):
        parity.require_parity(report(outliers=0.02))


def test_margins_may_differ_where_a_kink_is():
    expected = np.full(200, 0.5)
    expected[:3] = [np.inf, 0.0, 1e-9]
    got = expected.copy()
    got[2] = 2e-9  # small beside the largest
    got[5] = 0.51
    told = parity.compare_margins(expected, got)
    assert told["outliers"] == pytest.approx(1 / 200) and told["median_relative_difference"] == 0
    assert parity.compare_margins(expected, np.full(200, np.nan))["outliers"] == 1.0
    infinite = np.full(4, np.inf)
    assert parity.compare_margins(infinite, infinite)["outliers"] == 0
    assert parity.compare_margins(infinite, np.ones(4))["outliers"] == 1


@pytest.mark.parametrize(
    ("margins", "keep", "threshold"),
    [
        (np.arange(20) + 1.0, 0.95, 1.5),  # one of twenty may be stopped
        (np.arange(20) + 1.0, 1.0, 0.5),
        (np.arange(20) + 1.0, 0.5, 10.5),
        (np.array([0.4, 0.2]), 0.95, 0.1),
        (np.array([0.4, 0.4, 0.4, 0.2]), 0.5, 0.3),  # ties: none of them is stopped
        (np.array([0.0, 0.0]), 0.95, 0.0),
        (np.array([np.inf, 1.0, np.inf]), 0.5, 1.0),
        (np.array([np.inf]), 0.95, 0.0),
    ],
)
def test_the_threshold(margins, keep, threshold):
    wrong = np.array([99.0, 0.001])
    every = np.concatenate([wrong, margins])
    right = np.array([False] * 2 + [True] * len(margins))
    value, rule = choose_threshold(every, right, keep)
    assert value == np.float32(threshold)
    assert f"{100 * keep:g} %" in rule
    assert (margins > value).mean() >= keep or (margins == 0).all()


def test_without_right_predictions_the_threshold_is_epsilon():
    value, rule = choose_threshold([0.3], [False], fallback=0.1)
    assert value == np.float32(0.1) and "no validation image" in rule


def test_trust_summary():
    margins = np.array([0.1, 0.3, 0.5, 0.1, 0.2, 0.3])
    right = np.array([True, True, False, False, False, False])
    attacked = np.array([False, False, False, True, True, True])
    assert trust_summary(margins > 0.2, right, attacked) == {
        "right_clean": {"n": 2, "trusted": 0.5},
        "wrong_clean": {"n": 1, "trusted": 1.0},
        "right_attacked": {"n": 0, "trusted": None},
        "wrong_attacked": {"n": 3, "trusted": pytest.approx(1 / 3)},
    }


def toy_data(n_test=10, n_val=6):
    parts = {}
    for seed, (part, n) in enumerate((("train", 30), ("val", n_val), ("test", n_test))):
        parts[f"x_{part}"], y = images(n, seed=seed)
        parts[f"y_{part}"] = np.arange(n) % 3 if part == "train" else y
    return from_arrays(parts)


def test_too_few_images_come_again_with_noise():
    data = toy_data()
    x, y = gate_images(data, 40, 0.05)
    own = np.concatenate([data.x_test, data.x_val])
    np.testing.assert_array_equal(x[:16], own)
    np.testing.assert_array_equal(y[:16], np.concatenate([data.y_test, data.y_val]))
    np.testing.assert_array_equal(y[32:], y[:8])
    moved = np.abs(x[16:32] - own)
    assert 0.04 < moved.max() <= 0.05 + 1e-6 and x.min() >= 0 and x.max() <= 1
    assert not np.array_equal(x[16:32], x[32:48][:16]) and x.dtype == np.float32
    few, _ = gate_images(data, 4, 0.05)
    np.testing.assert_array_equal(few, data.x_test[:4])


def test_the_reference_attacks_every_image(tmp_path):
    model = network()
    model.save(tmp_path / "m.keras")
    x, _ = images(20)
    made = reference(tmp_path / "m.keras", x, 0.1, "linf", 3)
    np.testing.assert_array_equal(made["images"][:20], x)
    moved = np.abs(made["images"][20:] - x).max(axis=(1, 2, 3))
    assert made["changed"] == 20 and (0.05 < moved).all() and (moved <= 0.1 + 1e-6).all()
    z = keras.ops.convert_to_numpy(model(made["images"], training=False))
    np.testing.assert_allclose(made["logits"], z, atol=1e-5)


def test_a_model_that_is_random_at_inference_is_refused(tmp_path):
    @keras.saving.register_keras_serializable("tests")
    class Noisy(keras.layers.Layer):
        def __init__(self, **options):
            super().__init__(**options)
            self.generator = keras.random.SeedGenerator(0)

        def call(self, x):
            return x + 0.1 * keras.random.normal(keras.ops.shape(x), seed=self.generator)

    keras.Sequential([keras.Input((6, 6, 1)), Noisy(), *network().layers]).save(
        tmp_path / "noisy.keras"
    )
    with pytest.raises(UserError, match=r"random at inference. Received: 'noisy.keras'"):
        reference(tmp_path / "noisy.keras", images(4)[0], 0.1, "linf", 3)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        ("damaged", r"cannot load the model.*bad\.keras"),
        ("softmax", r"must end in logits.*'softmax'.*Make the last layer linear"),
        ("probabilities", r"must end in logits.*sum to 1"),
        ("one output", r"one logit per class.*K >= 2"),
        ("two heads", r"one logit per class.*2 outputs"),
        ("other images", r"model and data do not fit.*\(6, 6, 1\).*\(9, 9, 1\)"),
        ("too few classes", r"model and data do not fit.*3 classes.*2 outputs"),
        ("not finite", r"logits that are not finite"),
    ],
)
def test_what_is_no_classifier_of_the_data(tmp_path, make, message):
    from keras import layers

    path, side = tmp_path / "bad.keras", 9 if make == "other images" else 6
    outputs = {"one output": 1, "too few classes": 2}.get(make, 3)
    image = keras.Input((side, side, 1))
    activation = "softmax" if make == "softmax" else None
    z = layers.Dense(outputs, activation=activation)(layers.Flatten()(image))
    if make == "probabilities":
        z = keras.ops.softmax(z)
    model = keras.Model(image, [z, z] if make == "two heads" else z)
    if make == "not finite":
        model.layers[-1].set_weights([np.full((36, 3), np.nan), np.zeros(3)])
    model.save(path)
    if make == "damaged":
        path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(UserError, match=message):
        reference(path, images(8)[0], 0.1, "linf", 3)


@pytest.fixture(scope="module")
def staged(tmp_path_factory):
    """What the gate of a sound export finds: its ``work`` folder, beside ``model``."""
    staging = tmp_path_factory.mktemp("staging")
    work = staging / "work"
    work.mkdir()
    model = network()
    x, y = images(500)
    z = keras.ops.convert_to_numpy(model(x, training=False))
    margins = effective_margins(model, x[:64], z[:64].argmax(axis=1))
    names = savedmodel.write(
        Served(model, (6, 6, 1), "abc", "linf", 0.005), staging / "model", with_attack=True
    )
    warmup.write(staging / "model", "toy", names, 3, x[0], 0.1)
    (work / stages.JOB).write_text("{}")
    np.savez(work / stages.DATA, y=y[:250])
    np.savez(work / "reference.npz", images=x, logits=z)
    np.savez(work / "margins.npz", index=np.arange(64), l2=margins.l2, linf=margins.linf)
    return work


def test_a_sound_model_passes(staged):
    told = stages.run(["gate"], staged)["gate"]
    assert told["parity"]["logits"]["images"] == 500
    assert told["parity"]["logits"]["relative_difference"] < 1e-5
    assert told["parity"]["logits"]["label_flips"] == 0
    assert told["parity"]["effective_margins"]["linf"]["images"] == 64
    assert sys.platform != "linux" or told["parity"]["xla_turned_off"]
    counted = [told["trusted"][f"{v}_clean"]["n"] for v in ("right", "wrong")]
    assert sum(counted) == 64


@pytest.mark.parametrize("what", ["logits", "l2"])
def test_a_difference_is_found(staged, what):
    file = staged / ("reference.npz" if what == "logits" else "margins.npz")
    with np.load(file) as kept:
        arrays = dict(kept)
    scale = np.abs(arrays[what]).max()
    planted = {**arrays, what: arrays[what].copy()}
    if what == "logits":
        planted["logits"][123, 1] += 3e-5 * scale
    else:
        planted["l2"] *= 1.01
    np.savez(file, **planted)
    try:
        with pytest.raises(ParityError, match=r"differ by 3\.0e-05|margins \(l2\)"):
            stages.run(["gate"], staged)
    finally:
        np.savez(file, **arrays)


class Compiled(tf.Module):
    """A function that XLA must compile, called by one that it need not."""

    def __init__(self):
        super().__init__()
        self.w = tf.Variable(tf.ones((3, 2)))

        @tf.function(jit_compile=True)
        def inner(x):
            return x @ self.w

        self.f = tf.function(
            lambda image: {"logits": inner(image), "class_id": tf.argmax(image, -1)},
            input_signature=[tf.TensorSpec((None, 3), tf.float32, "image")],
        )


def test_what_xla_must_compile_is_refused(tmp_path, staged):
    module = Compiled()
    tf.saved_model.save(module, str(tmp_path), signatures={"serving_default": module.f})
    with pytest.raises(ParityError, match=r"needs XLA.*_XlaMustCompile.*nothing is published"):
        parity.require_no_xla(tmp_path)
    parity.require_no_xla(staged.parent / "model")


def test_the_gate_refuses_such_a_model(staged):
    model, kept = staged.parent / "model", staged.parent / "kept"
    module = Compiled()
    model.rename(kept)
    try:
        tf.saved_model.save(module, str(model), signatures={"serving_default": module.f})
        with pytest.raises(ParityError, match="needs XLA"):
            stages.run(["gate"], staged)
    finally:
        shutil.rmtree(model)
        kept.rename(model)


@pytest.mark.parametrize("op", ["XlaCallModule", "XlaLaunch"])
@pytest.mark.parametrize("where", ["graph", "library"])
def test_xla_calls_are_refused_wherever_they_are(tmp_path, op, where):
    from tensorflow.core.protobuf import saved_model_pb2

    saved = saved_model_pb2.SavedModel()
    graph = saved.meta_graphs.add().graph_def
    nodes = graph.node if where == "graph" else graph.library.function.add().node_def
    node = nodes.add()
    node.name, node.op = "culprit", op
    (tmp_path / "saved_model.pb").write_bytes(saved.SerializeToString())
    with pytest.raises(ParityError, match=rf"node culprit \({op}\)"):
        parity.require_no_xla(tmp_path)


def test_the_session_has_xla_turned_off(tmp_path):
    """The static check aside, the gate itself fails as TensorFlow Serving would."""
    module = Compiled()
    tf.saved_model.save(module, str(tmp_path / "m"), signatures={"serving_default": module.f})
    code = (
        "import sys, numpy as np\n"
        "from keras_emr_serving.export import gate\n"
        "assert gate.isolate()\n"
        "for name in gate.BLOCKED:\n"
        "    try:\n"
        "        __import__(name)\n"
        "    except ImportError:\n"
        "        continue\n"
        "    raise AssertionError(name)\n"
        "try:\n"
        "    gate.observe(sys.argv[1], np.ones((1, 3), 'float32'), np.ones((1, 3), 'float32'))\n"
        "except Exception as error:\n"
        "    print('ANSWER', ' '.join(str(error).split()))\n"
    )
    from tests.cli.harness import python

    result = python("-c", code, tmp_path / "m")
    assert "ANSWER" in result.out and "XLA compilation disabled" in result.out, result


def test_a_stage_that_crashes_is_told_in_one_line(tmp_path):
    (tmp_path / stages.JOB).write_text("{}")
    np.savez(tmp_path / stages.DATA, y=np.zeros(1))
    with pytest.raises(stages.ExportFailed, match=r"gate ended without a result \(exit code 1\)"):
        stages.run(["gate"], tmp_path)
