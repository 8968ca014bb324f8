"""One backend's numbers from given arrays: ``worker.py IN.npz OUT.npz``.

Run with KERAS_BACKEND set; ``test_parity.py`` compares what the backends wrote.
"""

import sys

import keras
import numpy as np
from keras import layers

import keras_emr as ke
from keras_emr import backend
from keras_emr.attacks import ATTACKS
from keras_emr.attacks.base import Objective
from keras_emr.defenses import DEFENSES, get_defense
from keras_emr.evaluation.attack_run import AttackRun
from keras_emr.network import Network
from keras_emr.regularizers.schedules import WarmUp
from keras_emr.training.averaging import EMA
from keras_emr.training.learning_rates import learning_rate
from keras_emr.training.optimizers import SGD
from keras_emr.training.weight_perturbation import AWP

EPSILON = 0.1
EMR = [
    {"weighting": "softmax"},
    {"weighting": "runner_up_difference", "norm": "l1", "power": 1},
    {"weighting": "exact", "center": True},
    {"weighting": "predicted", "estimator": "finite_difference"},
]


# Learned maximizers; the first is the one whose whole joint step is compared.
LEARNED = {
    "lstm": ({"cell": "lstm"}, {}),
    # So near the image as its own start, the gradient of KL is half rounding in float32.
    "rnn-kl": (
        {"cell": "rnn", "preprocessing": "max_abs"},
        {"objective": "kl", "start": "uniform"},
    ),
    "deep": (
        {"layers": 2, "use_bias": True, "preprocessing": "adam_ratio"},
        {"latent": True, "bptt_horizon": 2},
    ),
    "sign": ({"cell": "lstm", "preprocessing": "sign"}, {"start": "uniform"}),
}


# Attacks of evaluation: without a sign, so that only rounding differs, and with one.
SEARCHED = {
    "apgd-t": {"norm": "l2", "steps": 6},
    "cw-l2": {"searches": 2, "iterations": 10, "initial_c": 10.0, "learning_rate": 0.1},
    "deepfool": {"norm": "l2", "steps": 6},
    "fab-t": {"norm": "l2", "steps": 6},
    "mi-fgsm": {"steps": 6},
}


class Given:
    """A sampler that returns stored noise, so that every backend starts at the same point."""

    def __init__(self, given):
        self.given = given

    def uniform(self, shape, low=-1.0, high=1.0):
        return keras.ops.convert_to_tensor(self.given["uniform"])

    def normal(self, shape):
        return keras.ops.convert_to_tensor(self.given["normal"])


def build():
    return keras.Sequential(
        [
            keras.Input((10, 10, 1)),
            layers.Conv2D(6, 3),
            layers.BatchNormalization(),
            layers.Activation("relu"),
            layers.MaxPooling2D(2),
            layers.Conv2D(8, 3, activation="tanh"),
            layers.Flatten(),
            layers.Dense(5),
        ]
    )


def fresh(given):
    model = build()
    model.set_weights([given[f"w{i}"] for i in range(len(model.weights))])
    return model


def made(name):
    return get_defense(name, **({"batch_size": 64} if name == "free-at" else {}))


class FixedAttack(ke.PGD):
    """PGD from stored noise: the whole step can be compared, attack included."""

    given = None

    def __call__(self, objective, x, sampler, classes=None):
        return super().__call__(objective, x, Given(self.given), classes)


class FixedLearned(ke.LearnedAttack):
    """The learned attack from stored noise."""

    given = None

    def draw(self, x, sampler, classes=None):
        return super().draw(x, Given(self.given), classes)


def learned(given, name):
    """An attack whose maximizer has the given weights, used in order."""
    layer, options = LEARNED[name]
    maximizer = ke.LearnedMaximizer(hidden=5, **layer)
    stock = given["phi"]
    for v in maximizer.variables:
        size = int(np.prod(v.shape))
        v.assign(stock[:size].reshape(v.shape))
        stock = stock[size:]
    return FixedLearned(EPSILON, maximizer=maximizer, steps=4, **options)


def on_cpu(value):
    where = value.devices() if backend.NAME == "jax" else value.device
    return "cpu" in str(where).lower()


def main(source, target):
    given = dict(np.load(source))
    FixedAttack.given = FixedLearned.given = given
    x, y = keras.ops.convert_to_tensor(given["x"]), keras.ops.convert_to_tensor(given["y"])
    x_adv = keras.ops.convert_to_tensor(given["x_adv"])
    out = {}

    def keep(name, value):
        out[name] = np.array(keras.ops.convert_to_numpy(value))

    model = fresh(given)
    network = Network(model)
    clean, adversarial = network.frozen()(x), network.frozen()(x_adv)
    for name in DEFENSES.names:
        defense = made(name)
        teacher = {"teacher": -clean} if defense.needs_teacher else {}
        keep(f"loss/{name}", defense.loss(y, clean, adversarial, 100, **teacher))
    for i, options in enumerate(EMR):
        penalty = ke.EffectiveMarginRegularizer(**options)
        kind = "emr_difference" if options.get("estimator") else "emr"
        keep(f"{kind}/{i}", penalty(network, x, x_adv, y, None))
    for name in ("cross_entropy", "kl", "margin"):
        objective = Objective(network.frozen(), name, x, y)
        keep(f"gradient/{name}", objective.gradient(x_adv))
        attack = ke.PGD(EPSILON, steps=1, start="uniform")
        state = attack.begin(objective, x, attack.draw(x, Given(given)))
        keep(f"sign/{name}", attack.step(objective, x, state)[0] - x)
    margins = ke.effective_margins(model, given["x"], given["y"])
    keep("margins/l2", margins.l2)
    keep("margins/linf", margins.linf)

    right = keras.ops.convert_to_numpy(keras.ops.argmax(clean, axis=-1)).astype("int32")
    for name, options in SEARCHED.items():
        radius = EPSILON if options.get("norm", "linf") == "linf" else 5 * EPSILON
        attack = ATTACKS.get(name)(None if name in ("cw-l2", "deepfool") else radius, **options)
        run = AttackRun(model, attack, len(right))
        images, _ = run.attack_batch(given["x"], right, np.arange(len(right)), 0, 0)
        keep(f"{'sign' if name == 'mi-fgsm' else 'search'}/{name}", images - given["x"])

    for name in LEARNED:
        attack = learned(given, name)
        objective = Objective(network.frozen(), attack.objective or "cross_entropy", x, y)
        images, value, gradients = attack.meta_gradient(objective, x, attack.draw(x, None))
        kind = "learned_sign" if name == "sign" else "learned"
        keep(f"{kind}/{name}", images - x)
        if name != "sign":
            keep(f"meta_value/{name}", value)
            for i, gradient in enumerate(gradients):
                keep(f"meta_gradient/{name}/{i}", gradient)
    robust = ke.RobustClassifier(fresh(given), "at", attack=learned(given, "lstm"))
    robust.compile(keras.optimizers.SGD(0.1), maximizer_optimizer=keras.optimizers.SGD(1.0))
    history = robust.fit(given["x"], given["y"], batch_size=64, shuffle=False, verbose=0)
    keep("joint/inner_loss", history.history["inner_loss"][0])
    for kind, layer in (("phi", robust.maximizer), ("theta", robust.model)):
        for i, weight in enumerate(layer.weights):
            keep(f"joint/{kind}/{i}", weight.value)

    for name in DEFENSES.names:
        model = fresh(given)
        # One optimizer step, from adversarial images that no backend may round differently.
        attack = None if name == "standard" else FixedAttack(EPSILON, steps=1, step_size=0.0)
        robust = ke.RobustClassifier(
            model,
            made(name),
            attack=attack and attack.with_defaults(start="uniform"),
            regularizers=[ke.EffectiveMarginRegularizer(0.1)],
            teacher=fresh(given) if name == "lbgat" else None,
        )
        robust.compile(keras.optimizers.SGD(0.1, momentum=0.9))
        history = robust.fit(given["x"], given["y"], batch_size=64, shuffle=False, verbose=0)
        keep(f"step_loss/{name}", history.history["loss"][0])
        for i, weight in enumerate(model.weights):
            keep(f"step/{name}/{i}", weight.value)

    # Two steps of everything that surrounds one: perturbed weights, the recipes' SGD, an average.
    attack = FixedAttack(EPSILON, steps=1, step_size=0.0).with_defaults(start="uniform")
    robust = ke.RobustClassifier(
        fresh(given),
        ke.TRADES(6.0, label_smoothing=0.1),
        attack=attack,
        averaging=EMA(0.5),
        weight_perturbation=AWP(0.01),
        epsilon_schedule=WarmUp(2),
    )
    rate = learning_rate("cyclic", 0.1, 1, 4, warmup=1)
    robust.compile(SGD(rate, nesterov=True, weight_decay=0.01, global_clipnorm=5.0))
    options = {"batch_size": 64, "epochs": 3, "shuffle": False, "verbose": 0}
    robust.fit(given["x"], given["y"], **options)
    with robust.averaged():
        for i, weight in enumerate(robust.model.weights):
            keep(f"extras/{i}", weight.value)
    keep("backend", np.array(backend.NAME))
    keep("device", np.array("cpu" if on_cpu(robust.model.weights[0].value) else "gpu"))
    np.savez(target, **out)


if __name__ == "__main__":
    main(*sys.argv[1:])
