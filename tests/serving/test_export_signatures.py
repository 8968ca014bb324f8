"""What an exported model answers, against NumPy, Keras and keras_emr."""

import struct
import zlib

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

from keras_emr import PGD, effective_margins
from keras_emr_serving.export import savedmodel, warmup
from keras_emr_serving.export.signatures import MAX_STEPS, Served
from keras_emr_serving.server.inference import Model
from keras_emr_serving.server.servable import Servable
from keras_emr_serving.server.warmup import replay
from tests.builders import images, network

LABELS = ("ant", "bee", "cat")
THRESHOLD = 0.05


def load(folder):
    return tf.saved_model.load(str(folder)).signatures


def save(
    factory, model, shape=(6, 6, 1), labels=LABELS, norm="linf", attack=False, threshold=THRESHOLD
):
    folder = factory.mktemp("saved") / "1"
    savedmodel.write(Served(model, shape, labels, norm, threshold), folder, attack)
    return folder


def linear(classes, shape=(4, 4, 1), seed=0):
    """A linear classifier, its weights (D, K) and biases (K,)."""
    keras.utils.set_random_seed(seed)
    model = keras.Sequential([keras.Input(shape), layers.Flatten(), layers.Dense(classes)])
    rng = np.random.default_rng(seed)
    w = rng.normal(size=(int(np.prod(shape)), classes)).astype("float32")
    b = rng.normal(size=classes).astype("float32")
    model.layers[-1].set_weights([w, b])
    return model, w.astype("float64"), b.astype("float64")


@pytest.fixture(scope="module")
def model():
    return network()


@pytest.fixture(scope="module")
def folder(tmp_path_factory, model):
    return save(tmp_path_factory, model, attack=True)


@pytest.fixture(scope="module")
def served(folder):
    return load(folder)


def softmax(z):
    e = np.exp(z - z.max(axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True)


def logits_of(model, x):
    return keras.ops.convert_to_numpy(model(x, training=False))


def encoded_examples(x):
    return tf.constant([warmup.example(image).SerializeToString() for image in x])


def test_names_types_and_shapes(folder):
    from tensorflow.core.protobuf import saved_model_pb2

    saved = saved_model_pb2.SavedModel()
    saved.ParseFromString((folder / "saved_model.pb").read_bytes())
    (meta,) = saved.meta_graphs

    def told(tensors):
        return {
            key: (tf.as_dtype(t.dtype).name, [d.size for d in t.tensor_shape.dim])
            for key, t in tensors.items()
        }

    image = {"image": ("float32", [-1, 6, 6, 1])}
    answers = {
        "probabilities": ("float32", [-1, 3]),
        "logits": ("float32", [-1, 3]),
        "class_id": ("int64", [-1]),
    }
    number = ("float32", [-1])
    robust = {"margin": number, "effective_margin_l2": number, "effective_margin_linf": number}
    asked = {"label": ("int64", [-1]), "epsilon": number, "steps": ("int32", [-1])}
    examples = {"inputs": ("string", [-1])}
    expected = {
        "serving_default": (image, answers),
        "robust": (image, {**answers, **robust, "trusted": ("bool", [-1])}),
        "attack": (
            {**image, **asked},
            {"adversarial": image["image"], "logits": answers["logits"]},
        ),
        "classify": (examples, {"classes": ("string", [-1, 3]), "scores": ("float32", [-1, 3])}),
        "regress": (examples, {"outputs": number}),
        "image_bytes": ({"image_bytes": ("string", [-1])}, answers),
    }
    found = {k: v for k, v in meta.signature_def.items() if not k.startswith("__")}
    assert {k: (told(v.inputs), told(v.outputs)) for k, v in found.items()} == expected
    methods = {k: v.method_name.removeprefix("tensorflow/serving/") for k, v in found.items()}
    special = {"classify": "classify", "regress": "regress"}
    assert methods == {name: special.get(name, "predict") for name in expected}


def test_the_attack_is_only_there_if_asked_for(tmp_path_factory, model):
    assert "attack" not in load(save(tmp_path_factory, model))


@pytest.mark.parametrize("n", [1, 5, 64])
def test_serving_default(served, model, n):
    x, _ = images(n)
    got = {k: v.numpy() for k, v in served["serving_default"](image=tf.constant(x)).items()}
    z = logits_of(model, x)
    np.testing.assert_allclose(got["logits"], z, atol=1e-5 * np.abs(z).max())
    np.testing.assert_allclose(got["probabilities"], softmax(z), atol=1e-6)
    np.testing.assert_array_equal(got["class_id"], z.argmax(axis=1))


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_robust(tmp_path_factory, model, norm):
    x, _ = images(40)
    z = logits_of(model, x)
    expected = effective_margins(model, x, z.argmax(axis=1))
    in_order = np.sort(getattr(expected, norm))
    threshold = (in_order[9] + in_order[10]) / 2
    served = load(save(tmp_path_factory, model, norm=norm, threshold=threshold))
    got = {k: v.numpy() for k, v in served["robust"](image=tf.constant(x)).items()}
    np.testing.assert_allclose(got["effective_margin_l2"], expected.l2, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(got["effective_margin_linf"], expected.linf, rtol=1e-4, atol=1e-6)
    top = np.sort(z, axis=1)
    np.testing.assert_allclose(got["margin"], top[:, -1] - top[:, -2], atol=1e-5)
    np.testing.assert_array_equal(got["trusted"], getattr(expected, norm) > threshold)
    assert got["trusted"].sum() == 30


@pytest.mark.parametrize("classes", [2, 40])  # nodes of the graph, and a loop
def test_effective_margins_of_a_linear_model(tmp_path_factory, classes):
    """The exact distances to its boundaries."""
    model, w, b = linear(classes)
    labels = [str(k) for k in range(classes)]
    served = load(save(tmp_path_factory, model, (4, 4, 1), labels))
    x = np.random.default_rng(1).uniform(size=(9, 4, 4, 1)).astype("float32")
    got = served["robust"](image=tf.constant(x))
    z = x.reshape(9, -1).astype("float64") @ w + b
    y = z.argmax(axis=1)
    for norm, order in (("l2", 2), ("linf", 1)):
        distance = np.full((9, classes), np.inf)
        for i in range(9):
            for j in set(range(classes)) - {y[i]}:
                gap = z[i, y[i]] - z[i, j]
                distance[i, j] = gap / np.linalg.norm(w[:, y[i]] - w[:, j], order)
        margins = got[f"effective_margin_{norm}"].numpy()
        np.testing.assert_allclose(margins, distance.min(axis=1), rtol=1e-4)
    assert (margins < np.inf).all()


def test_where_the_gradient_is_zero_the_boundary_is_infinitely_far(tmp_path_factory):
    model, w, _ = linear(3)
    model.layers[-1].set_weights([np.zeros_like(w, "float32"), np.array([1, 3, 2], "float32")])
    served = load(save(tmp_path_factory, model, (4, 4, 1)))
    got = served["robust"](image=tf.zeros((2, 4, 4, 1)))
    assert got["effective_margin_l2"].numpy().tolist() == [np.inf] * 2
    assert got["margin"].numpy().tolist() == [1, 1] and got["trusted"].numpy().all()
    model.layers[-1].set_weights([np.zeros_like(w, "float32"), np.array([3, 3, 2], "float32")])
    got = load(save(tmp_path_factory, model, (4, 4, 1)))["robust"](image=tf.zeros((1, 4, 4, 1)))
    assert got["effective_margin_linf"].numpy().tolist() == [0]
    assert not got["trusted"].numpy().any()


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_the_attack_is_keras_emrs_pgd(tmp_path_factory, model, norm):
    from keras_emr.attacks.base import Objective
    from keras_emr.network import Network

    served = load(save(tmp_path_factory, model, norm=norm, attack=True))
    x, y = images(8)
    epsilon, steps = (0.1, 4) if norm == "linf" else (0.8, 4)
    pgd = PGD(epsilon, norm, steps=steps, start="none", objective="cross_entropy")
    logits_fn = Network(model).frozen()
    objective = Objective(logits_fn, "cross_entropy", tf.constant(x), tf.constant(y))
    expected = pgd(objective, tf.constant(x), None).numpy()
    several = {
        "label": tf.constant(y, tf.int64),
        "epsilon": tf.fill([8], epsilon),
        "steps": tf.fill([8], steps),
    }
    got = served["attack"](image=tf.constant(x), **several)
    np.testing.assert_allclose(got["adversarial"].numpy(), expected, atol=2e-6)
    np.testing.assert_allclose(got["logits"].numpy(), logits_of(model, expected), atol=1e-4)

    # Each image has an epsilon and a number of steps of its own.
    several["steps"] = tf.constant([steps, 0, 1, steps] * 2)
    several["epsilon"] = tf.constant([epsilon, epsilon, epsilon, 0.0] * 2)
    mixed = served["attack"](image=tf.constant(x), **several)["adversarial"].numpy()
    np.testing.assert_allclose(mixed[[0, 4]], expected[[0, 4]], atol=2e-6)
    np.testing.assert_array_equal(mixed[[1, 3, 5, 7]], x[[1, 3, 5, 7]])
    one = PGD(epsilon, norm, steps=1, start="none", objective="cross_entropy")
    expected = one(objective, tf.constant(x), None).numpy()
    np.testing.assert_allclose(mixed[[2, 6]], expected[[2, 6]], atol=2e-6)
    assert np.abs(expected - x).max() > 0.05


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"label": [0, 3]}, "label: expected 0 to 2"),
        ({"label": [-1, 0]}, "label: expected 0 to 2"),
        ({"label": [0]}, "label: expected one for each image"),
        ({"epsilon": [0.1]}, "epsilon: expected one for each image"),
        ({"epsilon": [0.1, -0.1]}, "epsilon: expected finite numbers"),
        ({"epsilon": [0.1, np.nan]}, "epsilon: expected finite numbers"),
        ({"steps": [1, MAX_STEPS + 1]}, f"steps: expected 0 to {MAX_STEPS}"),
        ({"steps": [-1, 1]}, "steps: expected 0 to"),
    ],
    ids=str,
)
def test_what_the_attack_refuses(served, change, message):
    asked = {"label": [0, 1], "epsilon": [0.1, 0.1], "steps": [1, 1], **change}
    types = {"label": tf.int64, "epsilon": tf.float32, "steps": tf.int32}
    values = {key: tf.constant(value, types[key]) for key, value in asked.items()}
    with pytest.raises(tf.errors.InvalidArgumentError, match=message):
        served["attack"](image=tf.zeros((2, 6, 6, 1)), **values)


def test_classify_and_regress(served, model):
    x, _ = images(4)
    got = served["classify"](inputs=encoded_examples(x))
    assert got["classes"].numpy().tolist() == [[label.encode() for label in LABELS]] * 4
    np.testing.assert_allclose(got["scores"].numpy(), softmax(logits_of(model, x)), atol=1e-6)
    got = served["regress"](inputs=encoded_examples(x))["outputs"].numpy()
    expected = effective_margins(model, x, logits_of(model, x).argmax(axis=1))
    np.testing.assert_allclose(got, expected.linf, rtol=1e-4, atol=1e-6)
    with pytest.raises(tf.errors.InvalidArgumentError, match="image"):
        served["classify"](inputs=encoded_examples(x[:, :5]))
    with pytest.raises(tf.errors.InvalidArgumentError, match="parse example"):
        served["classify"](inputs=tf.constant(["no example"]))


def pixels(side=6, channels=1, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (side, side, channels), "uint8")


def test_image_bytes(served, model):
    first, second = pixels(seed=1), pixels(seed=2)
    encoded = tf.constant([tf.io.encode_png(p).numpy() for p in (first, second)])
    got = served["image_bytes"](image_bytes=encoded)
    x = np.stack([first, second]).astype("float32") / 255
    direct = served["serving_default"](image=tf.constant(x))
    for key in ("logits", "probabilities", "class_id"):
        np.testing.assert_allclose(got[key].numpy(), direct[key].numpy(), atol=1e-6)
    np.testing.assert_allclose(got["logits"].numpy(), logits_of(model, x), atol=1e-4)


def test_image_bytes_of_other_sizes_and_kinds(served):
    gray = np.full((17, 9, 1), 102, "uint8")  # 0.4 of white
    red = np.zeros((12, 12, 3), "uint8")
    red[..., 0] = 255
    files = [
        tf.io.encode_png(gray),
        tf.io.encode_jpeg(gray),
        tf.io.encode_png(np.repeat(gray, 4, axis=2)),  # with an alpha channel
        tf.io.encode_png(red),
        tf.io.encode_png(np.full((6, 6, 1), 0x6666, "uint16")),
    ]
    got = served["image_bytes"](image_bytes=tf.stack(files))["logits"].numpy()
    flat = served["serving_default"](image=tf.fill((1, 6, 6, 1), 0.4))["logits"].numpy()
    for row in (0, 1, 2, 4):
        np.testing.assert_allclose(got[row], flat[0], atol=1e-5)
    # Luminance of red: about 0.2126 (libpng) or 0.299 of white.
    ends = [tf.fill((1, 6, 6, 1), v) for v in (0.2, 0.31)]
    low, high = (served["serving_default"](image=end)["logits"].numpy()[0] for end in ends)
    k = np.abs(high - low).argmax()
    assert min(low[k], high[k]) <= got[3, k] <= max(low[k], high[k])


def png(width, height):
    """A PNG file of a few bytes that claims to be so large."""

    def chunk(kind, content):
        packed = kind + content
        return struct.pack(">I", len(content)) + packed + struct.pack(">I", zlib.crc32(packed))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"hello", "expected PNG or JPEG"),
        (b"", "expected PNG or JPEG"),
        (b"GIF89a" + b"\0" * 30, "expected PNG or JPEG"),
        (png(100_000, 100_000), "at most 33554432 pixels"),
        (png(2**32 - 1, 2**32 - 1), "at most 33554432 pixels"),
        (b"\x89PNG\r\n\x1a\n\0\0", "."),
        (b"\xff\xd8\xff\xe0", "."),
    ],
    ids=lambda value: repr(value)[:20],
)
def test_image_bytes_that_are_refused(served, content, message):
    with pytest.raises(tf.errors.InvalidArgumentError, match=message):
        served["image_bytes"](image_bytes=tf.constant([content]))


@pytest.mark.parametrize("shape", [(36,), (2, 36), (6, 6, 1), (1, 5, 6, 1), (1, 6, 6, 3), ()])
@pytest.mark.parametrize("signature", ["serving_default", "robust"])
def test_a_wrong_shape_is_an_error_of_the_request(served, signature, shape):
    with pytest.raises(tf.errors.InvalidArgumentError, match="not compatible with expected shape"):
        served[signature](image=tf.zeros(shape))


def test_every_weight_is_stored_once(folder, model):
    stored = tf.train.list_variables(str(folder / "variables" / "variables"))
    shapes = [tuple(shape) for name, shape in stored if "kept" in name]
    assert sorted(shapes) == sorted(tuple(v.shape) for v in model.variables)
    size = (folder / "variables" / "variables.data-00000-of-00001").stat().st_size
    weights = sum(np.asarray(v.value).nbytes for v in model.variables)
    assert weights <= size < weights + 4096
    big = sum(int(np.prod(shape)) for _, shape in stored)
    assert big == sum(int(np.prod(v.shape)) for v in model.variables) + 1  # its object graph


def test_dropout_and_mixed_precision(tmp_path_factory):
    """Inference mode, and float32 whatever the layers compute in."""
    x, _ = images(6)
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        model = network(dropout=0.5)
    finally:
        keras.config.set_dtype_policy("float32")
    plain = network()
    plain.set_weights([w for w in model.get_weights() if w.dtype == np.float32])
    got = load(save(tmp_path_factory, model))["serving_default"](image=tf.constant(x))["logits"]
    assert got.dtype == tf.float32
    np.testing.assert_allclose(got.numpy(), logits_of(plain, x), atol=1e-5)


@pytest.mark.parametrize("classes", [3, 40])  # for many, no large batch of gradients
def test_the_warm_up_asks_every_signature(folder, served, tmp_path, classes):
    from tensorflow_serving.apis import prediction_log_pb2

    names = sorted(served)
    image = images(1)[0][0]
    warmup.write(tmp_path, "toy", names, classes, image, 0.1)
    file = tmp_path / "assets.extra" / "tf_serving_warmup_requests"
    assert file.stat().st_size < 20_000
    logs = [
        prediction_log_pb2.PredictionLog.FromString(r.numpy())
        for r in tf.data.TFRecordDataset(str(file))
    ]
    slow = {"attack"} if classes == 3 else {"attack", "robust", "regress"}
    asked = [(name, n) for name in names for n in ((1,) if name in slow else (1, 32))]
    kinds = {"classify": "classify_log", "regress": "regress_log"}
    for (name, _), log in zip(asked, logs, strict=True):
        assert log.WhichOneof("log_type") == kinds.get(name, "predict_log")
        spec = getattr(log, log.WhichOneof("log_type")).request.model_spec
        assert (spec.name, spec.signature_name) == ("toy", name)
    servable, sizes = Servable(folder), []

    def run(feeds, *rest):
        values, seconds = servable.run(feeds, *rest)
        (size,) = {len(value) for value in values}
        sizes.append(size)
        return values, seconds

    assert replay(tmp_path, Model(servable.signatures, run)) == len(asked)
    assert sizes == [n for _, n in asked]
    servable.close()
