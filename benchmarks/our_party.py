"""``keras_emr`` as a party of ``peers.py``, and what all parties start from."""

import re

import numpy as np

# Steps of Adam, until the loss is half of chance. The loss of a fresh network hardly depends on the
# attack: it would say nothing about the work that the attack has done.
HEAD_START = (20, 300)
# Layers with weights. BatchNormalization: scale, offset, mean, variance; the others: kernel, bias.
_KINDS = ("Conv2D", "BatchNormalization", "Dense")


class Ours:
    """Keras on the backend of that name, set up as the command line does it."""

    def __init__(self, name, options, folder, given):
        from keras_emr_cli.session import select_backend

        select_backend(name)
        import keras

        keras.utils.set_random_seed(0)
        self.name, self.options = name, options
        self.path, self.given = folder / "model.keras", given
        self.images = given["x"]

    def _model(self):
        import keras

        return keras.saving.load_model(self.path, compile=False)

    def logits(self):
        import keras

        few = self.images[0][: len(self.given["logits"])]
        return keras.ops.convert_to_numpy(self._model()(few, training=False))

    def trainer(self, job):
        return KerasTrainer(self._model(), job, self.options, self.given)

    def on_gpu(self):
        if self.name == "torch":
            import torch

            return torch.cuda.is_available()
        if self.name == "jax":
            import jax

            return jax.default_backend() == "gpu"
        import tensorflow as tf

        return bool(tf.config.list_physical_devices("GPU"))

    def wait(self):
        """Until the device has done what it was told; the others' logs come with the whole step."""
        if self.name == "torch" and self.on_gpu():
            import torch

            torch.cuda.synchronize()


class KerasTrainer:
    def __init__(self, model, job, options, given):
        import keras

        self.classifier = robust_classifier(model, job, options)
        if job == "at-lstm":
            names = sorted(name for name in given if name.startswith("maximizer/"))
            self.classifier.maximizer.set_weights([given[name] for name in names])
        self.classifier.compile(keras.optimizers.SGD(0.0, momentum=options["momentum"]))

    def restart(self, learning_rate):
        """Go on with that learning rate, the maximizer's too; at 0 the momentum stayed 0."""
        self.classifier.optimizer.learning_rate = learning_rate
        if self.classifier.maximizer_optimizer is not None:
            self.classifier.maximizer_optimizer.learning_rate = learning_rate

    def step(self, x, y):
        logs = self.classifier.train_on_batch(x, y, return_dict=True)
        penalty = float(logs["emr"]) if "emr" in logs else None
        return {"loss": float(logs["loss"]), "penalty": penalty}


def robust_classifier(model, job, options):
    """``RobustClassifier`` for a job, not compiled yet."""
    import keras_emr as ke

    ball = {"epsilon": options["epsilon"], "steps": options["steps"]}
    pgd = ke.PGD(**ball, step_size=options["step_size"])
    defense, attack, regularizers = {
        "standard": ("standard", None, []),
        "at": ("at", pgd, []),
        "trades": (ke.TRADES(options["trades_beta"]), pgd, []),
        "mart": (ke.MART(options["mart_beta"]), pgd, []),
        "at-emr": ("at", pgd, [ke.EffectiveMarginRegularizer(options["emr"])]),
        "at-lstm": ("at", ke.LearnedAttack(**ball, maximizer="lstm"), []),
    }[job]
    return ke.RobustClassifier(
        model,
        defense,
        attack=attack,
        regularizers=regularizers,
        attack_precision=options["attack_precision"],
    )


def prepare(options, folder):
    """Write the network, its weights and the batches. Returns what was not known before."""
    from keras_emr_cli.session import select_backend

    select_backend("tensorflow")
    import keras

    import keras_emr as ke

    keras.utils.set_random_seed(0)
    draw, classes = _source(options)
    count, size = options["batches"], options["batch_size"]
    drawn = [draw(size) for _ in range(count)]
    x, y = (np.stack(part) for part in zip(*drawn, strict=True))
    model = ke.make_model(options["model"], x.shape[2:], classes)
    for layer in model._flatten_layers():
        if isinstance(layer, keras.layers.Dropout):
            layer.rate = 0.0
    learned = _head_start(model, lambda: draw(max(size, 16)), np.log(classes) / 2)
    logits = model(x[0][:8], training=False).numpy()
    model.save(folder / "model.keras")
    maximizer = {}
    if "at-lstm" in options["jobs"]:
        lstm = robust_classifier(model, "at-lstm", options).maximizer
        maximizer = {f"maximizer/{i:02d}": w for i, w in enumerate(lstm.get_weights())}
    given = {**keras_weights(model), **maximizer, "x": x, "y": y, "logits": logits}
    np.savez(folder / "given.npz", **given)
    return {"shape": x.shape[2:], "classes": classes, "head_start": learned}


def _head_start(model, draw, enough):
    """Train a little; the number of steps and the last loss."""
    import keras

    entropy = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(1e-3), entropy)
    least, most = HEAD_START
    for i in range(most):
        loss = float(model.train_on_batch(*draw()))
        if loss < enough and i >= least:
            break
    return {"steps": i + 1, "loss": loss}


def _source(options):
    """The function from a number to so many more images and labels, and the number of classes.

    Random images are noise around a pattern of their class, faint enough for the attack.
    """
    if options["data"] is None:
        rng, classes, shape = np.random.default_rng(0), 10, tuple(options["image"])
        contrast = min(4 * options["epsilon"], 0.25)
        patterns = rng.uniform(-contrast, contrast, (classes, *shape))

        def draw(n):
            y = rng.integers(0, classes, n)
            noise = rng.uniform(contrast - 0.5, 0.5 - contrast, (n, *shape))
            return (0.5 + patterns[y] + noise).astype("float32"), y

        return draw, classes
    from keras_emr.data import load

    data, taken = load(options["data"]), 0

    def draw(n):
        nonlocal taken
        index = np.arange(taken, taken + n) % len(data.x_train)
        taken += n
        return data.x_train[index], data.y_train[index].astype("int64")

    return draw, data.classes


def keras_weights(model):
    """``{"Conv2D/3/0": array, ...}``: kind, place among its kind as they were made, weight."""

    def made(layer):
        number = re.search(r"_(\d+)$", layer.name)
        return layer.name == "logits", int(number[1]) if number else 0

    found = {}
    for kind in _KINDS:
        layers = [layer for layer in model.layers if type(layer).__name__ == kind]
        for i, layer in enumerate(sorted(layers, key=made)):
            for j, weight in enumerate(layer.get_weights()):
                found[f"{kind}/{i}/{j}"] = np.asarray(weight)
    return found
