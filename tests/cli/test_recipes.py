"""Recipes: each parses, builds the classifier it describes, and says where it comes from."""

import numpy as np
import pytest

from keras_emr.data.dataset import from_arrays
from keras_emr.recipes import FOLDER, describe, locate, names
from keras_emr_cli.settings import merge
from keras_emr_cli.train_settings import TRAIN
from tests.cli.harness import assert_error, call

pytestmark = pytest.mark.usefixtures("warm_keras")
PUBLISHED = [
    *(f"mnist-{method}{emr}" for method in ("at", "trades") for emr in ("", "-emr")),
    *(
        f"cifar10-{method}{emr}-{network}"
        for method in ("at", "trades", "mart", "mail-at", "mail-trades")
        for emr in ("", "-emr")
        for network in ("resnet18", "wrn34-10")
    ),
    *("cifar100-lbgat0-wrn34-10", "cifar100-lbgat6-wrn34-10", "mnist-mma", "cifar10-mma-wrn28-4"),
    *("cifar10-at-he-wrn34-10", "cifar10-trades-he-wrn34-10", "cifar10-free-at-wrn34-10"),
    *("mnist-rnn-adv", "mnist-rnn-trades", "cifar10-rnn-adv-vgg16", "cifar10-rnn-trades-vgg16"),
]


def settings(name):
    return merge(TRAIN, {}, f"recipe:{name}", environment={})


def test_every_published_setting_has_its_recipe():
    assert set(PUBLISHED) <= set(names())
    assert len(names()) == len(list(FOLDER.glob("*.yaml"))) >= 28


@pytest.mark.parametrize("name", names())
def test_a_recipe_names_its_source_and_how_sure_it_is(name):
    first, *_ = open(locate(f"recipe:{name}")).read().splitlines()
    assert first == f"# keras-emr train --config recipe:{name}"
    facts = describe(name)
    assert list(facts) == ["Source", "Sure", "Differs", "Time and accuracy"]
    assert facts["Sure"].split()[0].strip(":,") in ("published", "released", "derived", "attack")
    # Nobody released EMR there.
    if "-emr" in name and settings(name).emr_preset is None:
        assert facts["Sure"].startswith("derived")


@pytest.fixture(scope="module")
def pictures():
    """Images of MNIST's and CIFAR's shape: what building needs."""
    made = {}
    for kind, shape in (("mnist", (28, 28, 1)), ("cifar10", (32, 32, 3))):
        x = np.zeros((300, *shape), "float32")
        x[:, 0, 0] = np.linspace(0, 1, 300)[:, None]
        y = np.arange(300) % 10
        parts = {"x_train": x, "y_train": y, "x_test": x[:10] / 2, "y_test": y[:10]}
        made[kind] = from_arrays(parts, validation=0.1)
    return {**made, "cifar100": made["cifar10"]}


@pytest.mark.parametrize("name", names())
def test_a_recipe_builds(name, pictures, monkeypatch):
    """The classifier, all but its weights: those of the widest networks take seconds to draw."""
    from keras_emr_cli import build

    s, made = settings(name), []

    def small(model, shape, classes, activation, normalization):
        made.append(model)
        from keras_emr.models import make_model

        return make_model("mlp", shape, classes, activation, normalization)

    monkeypatch.setattr(build, "make_model", small)
    data = pictures[name.split("-")[0]]
    robust = build.classifier(s, data)
    methods = (
        "lbgat",
        "mma",
        "free-at",
        "mail-at",
        "mail-trades",
        "mart",
        "trades",
        "at",
        "rnn-adv",
    )
    method = next(m for m in methods if m in name)
    assert robust.defense.name == method.replace("rnn-adv", "at")
    assert bool(robust.regularizers) == ("-emr" in name)
    assert (robust.maximizer is not None) == ("-rnn-" in name)
    if robust.maximizer is not None:
        assert sum(int(np.prod(v.shape)) for v in robust.maximizer.variables) == 120
    family = {"resnet18": "resnet18", "wrn34-10": "wide-resnet-34-10", "vgg16": "vgg16"}
    wanted = next((v for k, v in family.items() if name.endswith(k)), "small-cnn")
    assert wanted in made[0] or (name == "cifar10-mma-wrn28-4" and made[0] == "wide-resnet-28-4")
    assert (robust.model.layers[-2].name == "cosines") == ("-he-" in name)
    assert (made[1:] == ["resnet18"]) == (robust.teacher is not None) == ("lbgat" in name)


def test_what_the_released_recipes_say():
    """Spot checks against the notes on the authors' code, not against the files themselves."""
    from keras_emr_cli.build import defense, optimizer, regularizers

    s = settings("cifar10-trades-emr-wrn34-10")
    (emr,) = regularizers(s)
    assert (emr.weight, emr.temperature, emr.reduction) == (1.0, 1.0, "released")
    assert (defense(s).beta, s.attack_objective, s.start) == (12.0, "cross_entropy", "uniform")
    sgd = optimizer(s, 375)
    assert (sgd.l2, sgd.momentum, sgd.nesterov, sgd.decayed) == (0.001, 0.9, False, "all")
    rate = sgd._learning_rate
    steps = [60 * 375 - 1, 60 * 375, 120 * 375]  # at the end of epochs 60 and 120
    np.testing.assert_allclose([float(rate(step)) for step in steps], [0.1, 0.01, 0.001], rtol=1e-5)
    s = settings("cifar10-mart-resnet18")
    assert (defense(s).beta, float(s.epsilon), float(s.step_size)) == (5.0, 0.031, 0.007)
    rate = optimizer(s, 10)._learning_rate
    np.testing.assert_allclose([float(rate(739)), float(rate(740))], [0.01, 0.001], rtol=1e-5)
    assert defense(settings("cifar10-trades-he-wrn34-10")).logit_margin == pytest.approx(3.0)
    mma = defense(settings("cifar10-mma-wrn28-4"), 45000)
    assert (mma.clean_weight, mma.smallest, mma.examples) == (1 / 3, 0.005, 45000)
    mail = defense(settings("cifar10-mail-at-resnet18"))
    assert (mail.slope, mail.bias, mail.burn_in, mail.beta) == (10.0, -0.5, 76, 5.0)


def test_a_flag_wins_over_a_recipe(capfd):
    result = call(capfd, "config", "show", "--config", "recipe:mnist-trades", "--epochs", "3")
    rows = [line.split() for line in result.out.splitlines()]
    assert ["epochs", "3", "flag"] in rows and ["epsilon", "0.3", "config"] in rows


def test_recipes_are_listed_and_a_wrong_name_is_refused(capfd):
    listed = call(capfd, "config", "recipes").out.splitlines()
    assert [line.split(":")[0] for line in listed] == names()
    arguments = ["train", "--config", "recipe:mnist-trade", "--out", "run"]
    assert_error(
        call(capfd, *arguments), 3, "recipe", "'mnist-trade'", "did you mean 'mnist-trades'?"
    )
