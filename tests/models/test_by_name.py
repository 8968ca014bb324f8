"""Networks by name, from a file and from a function, and what is refused."""

import keras
import numpy as np
import pytest

from keras_emr import UserError
from keras_emr.models import check_model_name, make_model
from keras_emr.models.registry import located, short_name
from tests.builders import network

SOURCE = """
import keras

def tiny(input_shape, classes, activation="relu"):
    return keras.Sequential([
        keras.Input(input_shape), keras.layers.Flatten(),
        keras.layers.Dense(3, activation=activation), keras.layers.Dense(classes)])

def wrong_classes(input_shape, classes):
    return tiny(input_shape, classes + 1)

def no_model(input_shape, classes):
    return 7
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    (tmp_path / "my_networks.py").write_text(SOURCE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def test_a_function(here):
    model = make_model("my_networks:tiny", (4, 4, 1), 5, activation="tanh")
    assert model.output_shape == (None, 5)
    assert model.layers[1].activation.__name__ == "tanh"
    assert short_name("my_networks:tiny") == "my_networks-tiny"


def test_a_file_keeps_its_weights(here):
    model = network(side=4)
    model.save("net.keras")
    loaded = make_model("net.keras", (4, 4, 1), 3)
    for a, b in zip(model.get_weights(), loaded.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)
    assert located("net.keras") == str(here.resolve() / "net.keras")
    assert (short_name("a/net.keras"), located("mlp")) == ("net", "mlp")


def test_any_depth_and_width():
    assert make_model("wide-resnet-16-2", (8, 8, 1), 3).name == "wide_resnet_16_2"
    assert make_model("wide-resnet-10-1-emr", (8, 8, 1), 3).name == "wide_resnet_10_1_emr"


@pytest.mark.parametrize(
    ("name", "fragments"),
    [
        ("resnet19", ["'resnet19'", "did you mean 'resnet18'?", "FILE.keras"]),
        ("wide-resnet-33-10", ["6 n + 4", "'wide-resnet-33-10'"]),
        ("wide-resnet-4-10", ["6 n + 4"]),
        ("wide-resnet-10-0", ["'wide-resnet-10-0'"]),
        ("", ["''", "small-cnn"]),
        ("a b:c", ["'a b:c'"]),
    ],
)
def test_unknown_names(name, fragments):
    with pytest.raises(UserError) as caught:
        check_model_name(name)
    assert all(fragment in str(caught.value) for fragment in fragments), caught.value


@pytest.mark.parametrize(
    ("name", "shape", "options", "fragments"),
    [
        ("vgg16", (28, 28, 1), {}, ["32x32", "(28, 28, 1)"]),
        ("resnet18", (8, 8, 1), {"activation": "rely"}, ["activation", "'rely'", "silu"]),
        ("resnet18", (8, 8, 1), {"normalization": "cifar10"}, ["per channel", "(8, 8, 1)"]),
        ("mlp", (8, 8, 3), {"normalization": "mnist"}, ["'mnist'", "cifar10"]),
        ("missing.keras", (8, 8, 1), {}, ["cannot load", "missing.keras"]),
        ("net.keras", (8, 8, 1), {}, ["other images", "(4, 4, 1)", "(8, 8, 1)"]),
        ("net.keras", (4, 4, 1), {"activation": "tanh"}, ["activation", "no such option"]),
        ("wide.keras", (4, 4, 1), {}, ["number of classes", "(None, 7)", "3 classes"]),
        ("no_such_module:f", (8, 8, 1), {}, ["cannot import", "no_such_module"]),
        ("my_networks:nothing", (8, 8, 1), {}, ["cannot import", "nothing"]),
        ("my_networks:keras", (8, 8, 1), {}, ["not a function"]),
        ("my_networks:no_model", (8, 8, 1), {}, ["keras.Model", "int"]),
        ("my_networks:wrong_classes", (8, 8, 1), {}, ["number of classes", "(None, 4)"]),
        ("my_networks:wrong_classes", (8, 8, 1), {"activation": "silu"}, ["no such option"]),
    ],
)
def test_what_is_refused(here, name, shape, options, fragments):
    network(side=4).save("net.keras")
    network(side=4, classes=7).save("wide.keras")
    with pytest.raises(UserError) as caught:
        make_model(name, shape, 3, **options)
    message = str(caught.value)
    assert "\n" not in message and all(f in message for f in fragments), message


def test_narrow_networks_train_a_step():
    """Attack, AT and EMR through strides, shortcuts and BatchNorm; the loss is finite."""
    import keras_emr as ke

    keras.utils.set_random_seed(0)
    rng = np.random.default_rng(0)
    x, y = rng.uniform(size=(4, 8, 8, 3)).astype("float32"), np.arange(4) % 3
    model = make_model("wide-resnet-10-1-emr", (8, 8, 3), 3, normalization="cifar10")
    before = model.get_weights()
    emr = ke.EffectiveMarginRegularizer(0.01)
    robust = ke.RobustClassifier(model, "at", ke.FGSM(0.03), regularizers=[emr])
    robust.compile(keras.optimizers.SGD(0.1))
    history = robust.fit(x, y, batch_size=4, verbose=0).history
    assert np.isfinite(history["loss"][0]) and history["emr"][0] > 0
    assert all((a != b).any() for a, b in zip(before, model.get_weights(), strict=True))
