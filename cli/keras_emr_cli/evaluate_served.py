"""``keras-emr evaluate --url``: what a served model withstands. Imports keras."""

from __future__ import annotations

import hashlib

import numpy as np

from keras_emr.errors import UserError
from keras_emr_cli.served import open_client
from keras_emr_cli.settings import Merged
from keras_emr_cli.targets import load_model


def chosen(settings, with_source):
    """The settings with attacks that only ask.

    Args:
        settings: merged.
        with_source: whether there is a model to make images against.

    Raises:
        UserError: an attack that needs gradients.
    """
    from keras_emr.attacks import ATTACKS
    from keras_emr.attacks.query import QueryAttack

    asking = [name for name in ATTACKS.names if issubclass(ATTACKS.get(name), QueryAttack)]
    names = settings.attacks
    if settings.origins["attacks"] == "default":
        names = ["transfer", "square"] if with_source else ["square"]
    refused = [name for name in names if name not in asking]
    if refused:
        raise UserError(
            f"--attacks: a served model gives no gradients. Received: {', '.join(refused)}. "
            f"Expected attacks that only ask: {', '.join(asking)}. Images made by gradients: "
            "give the source model as RUN_OR_MODEL, and the attack transfer."
        )
    if "transfer" in names and not with_source and not settings.surrogates:
        raise UserError(
            "--attacks: transfer needs a model to make its images against. Received: none. Give "
            "the source model as RUN_OR_MODEL, or --surrogates."
        )
    return Merged({**settings.values, "attacks": names}, settings.origins)


def connect(settings):
    """A client that stays with one version: that which is served now."""
    fields = ("timeout", "retries", "ca", "certificate", "key")
    options = {name: getattr(settings, name) for name in fields}
    with open_client(settings.url, settings.grpc, options) as first:
        version = first.metadata().version
    return open_client(settings.url, settings.grpc, {**options, "version": version})


def served_target(client, data, batch_size):
    """What is attacked. Raises :class:`UserError` if data and served model do not fit."""
    from keras_emr_serving.client.target import ServedTarget

    target = ServedTarget(client, batch_size)
    shape = client.image_shape()
    fits = all(want in (None, has) for want, has in zip(shape, data.image_shape, strict=True))
    if not fits or target.classes < data.classes:
        raise UserError(
            f"model and data do not fit. Received: images {tuple(data.image_shape)} of "
            f"{data.classes} classes for a served model that takes {tuple(shape)} and has "
            f"{target.classes}."
        )
    return target


def load_source(path, data):
    """The model that the served one was exported from."""
    from keras_emr.evaluation.inputs import require_fit

    model = load_model(path)
    require_fit(model, data.image_shape, data.classes)
    return model


def agreement(source, path, target, x, y, settings, progress):
    """Whether the two models give the same labels, on clean images and on ones made to fool.

    Args:
        source: Keras classifier; ``path``: its file.
        target: the served model.
        x, y: checked images and labels.
        settings: epsilon, norm, steps, objective and seed of the PGD that makes images against
            ``source``.
        progress: called with a title, the images done and their number.

    Returns:
        The entry ``source`` of the report.
    """
    from keras_emr.attacks.pgd import PGD
    from keras_emr.evaluation.attack_run import AttackRun
    from keras_emr.evaluation.target import KerasTarget

    steps, size = settings.steps or 50, settings.batch_size
    attack = PGD(float(settings.epsilon), settings.norm, steps, objective=settings.objective)
    run, file = AttackRun(source, attack, size), KerasTarget(source, size)
    title = "agreement with the source"
    both = ("clean", "adversarial")
    here, there = ({name: [] for name in both} for _ in range(2))
    for begin in range(0, len(x), size):
        progress(title, begin, len(x))
        rows = slice(begin, begin + size)
        index = np.arange(begin, begin + len(x[rows]))
        made, _ = run.attack_batch(x[rows], y[rows], index, 0, settings.seed)
        for name, images in (("clean", x[rows]), ("adversarial", made)):
            here[name] += file.predict(images).argmax(axis=1).tolist()
            there[name] += target.predict(images).argmax(axis=1).tolist()
    progress(title, len(x), len(x))
    return {
        "path": str(path),
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "attack": f"PGD-{steps}",
        "n": len(x),
        **{name: _share(here[name], there[name]) for name in both},
        "source_accuracy": {name: _share(here[name], y) for name in both},
        "served_accuracy": {name: _share(there[name], y) for name in both},
    }


def _share(labels, others):
    return float(np.equal(labels, others).mean())


def model_entry(client):
    """The entry ``model`` of the report: there is no file to tell about."""
    served = client.metadata()
    name = f"{served.name}/versions/{served.version}"
    return {"name": name, "path": None, "sha256": None, "parameters": None}
