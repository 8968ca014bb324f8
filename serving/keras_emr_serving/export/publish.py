"""Export a trained classifier to TensorFlow Serving: ``STORE/NAME/VERSION``, or nothing."""

from __future__ import annotations

import datetime
import hashlib
import json
from importlib import metadata
from pathlib import Path

import numpy as np

from keras_emr._version import __version__
from keras_emr.errors import UserError
from keras_emr_serving.export import stages
from keras_emr_serving.export.reference import gate_images
from keras_emr_serving.store import AUTO, ModelFolder, check_version

FORMAT = "keras-emr-export/1"
CARD, PARITY = Path("assets.extra/keras_emr.json"), Path("assets.extra/parity.json")


def export(
    model,
    store,
    name,
    data,
    *,
    epsilon,
    norm="linf",
    version=AUTO,
    backend="tensorflow",
    with_attack=False,
    keep=0.95,
    n_images=512,
    seed=0,
    facts=None,
    progress=None,
):
    """Publish a model as ``store/name/version`` for TensorFlow Serving, if it passes the gate.

    The .keras file, saved on whichever backend, is read by a fresh process on TensorFlow. The gate
    runs the result as TensorFlow Serving does and compares it with the source model on its own
    backend, on clean and adversarial images. The version appears complete or not at all.

    Args:
        model: .keras file: a classifier from (N, H, W, C) images in [0, 1] to (N, K) logits.
        store: folder of models; made if need be.
        name: of the model in it.
        data: :class:`keras_emr.data.Dataset`; validation images choose the threshold of
            ``trusted``, test images go through the gate.
        epsilon, norm: threat model: ``linf`` or ``l2``, epsilon > 0 in [0, 1] units.
        version: a whole number from 1, or ``"auto"``: the highest so far + 1.
        backend: the one the model was trained on: ``tensorflow``, ``jax`` or ``torch``.
        with_attack: also serve PGD, for red-teaming.
        keep: share of right validation predictions that stay ``trusted``.
        n_images: clean images of the gate, from 500; as many adversarial ones are added.
        seed: of PGD's start and of the noise where there are fewer images.
        facts: more about the model to keep with it, plain values: metrics, epsilon as written.
        progress: called with a line of text before each stage.

    Returns:
        Plain dictionary: ``path``, ``name``, ``version``, and what ``assets.extra/`` holds:
        ``card`` and ``parity``.

    Raises:
        UserError: bad name, version or store, a version that exists, no classifier to logits, a
            file that cannot be read, data that does not fit.
        ParityError: the served model is not the source model.
        ExportFailed: a stage crashed.
    """
    say = progress or (lambda text: None)
    path, version = Path(model), check_version(version)
    if n_images < 500:
        raise UserError(f"n_images: too few. Received: {n_images}. Expected 500 or more.")
    folder = ModelFolder(store, name)
    folder.require_free(version)
    x, y = gate_images(data, n_images, float(epsilon), seed)
    job = {
        "model": str(path.resolve()),
        "name": name,
        "epsilon": float(epsilon),
        "norm": norm,
        "classes": data.classes,
        "labels": list(data.class_names),
        "keep": keep,
        "with_attack": with_attack,
        "seed": seed,
    }
    with folder.staging() as staging:
        work = staging / "work"
        try:
            work.mkdir()
            (work / stages.JOB).write_text(json.dumps(job))
            np.savez(work / stages.DATA, x=x, y=y, x_val=data.x_val, y_val=data.y_val)
        except OSError as error:
            raise folder.refused(error) from None
        told = _made(work, backend, say)
        say(f"gate: {2 * n_images} images through the Session loader, XLA off, no keras")
        told |= stages.run(["gate"], work)
        accuracy = _accuracy(work, y, min(n_images, len(data.x_test) + len(data.x_val)))
        built = staging / stages.MODEL
        checked = {
            **told["gate"]["parity"],
            "source_backend": backend,
            "clean_images": n_images,
            "adversarial_images": told["reference"]["changed"],
            "attack": {"name": "pgd", "epsilon": float(epsilon), "norm": norm, "steps": 10},
        }
        card = _card(path, data, job, told, backend, {**(facts or {}), "gate": accuracy})
        try:
            card["files"] = _hashes(built)
            for file, content in ((CARD, card), (PARITY, checked)):
                (built / file).write_text(json.dumps(content, indent=2, allow_nan=False) + "\n")
        except OSError as error:
            raise folder.refused(error) from None
        number = folder.publish(built, version)
    published = folder.path / str(number)
    return {
        "path": str(published),
        "name": name,
        "version": number,
        "card": card,
        "parity": checked,
    }


def _made(work, backend, say):
    """The results of the stages before the gate."""
    say(f"reference: logits and adversarial images of the source model on {backend}")
    if backend == "tensorflow":
        return stages.run(["reference", "build"], work)
    told = stages.run(["reference"], work, backend)
    say("build: SavedModel on tensorflow")
    return told | stages.run(["build"], work)


def _accuracy(work, y, own):
    """Of the source model on the gate's images without repetitions; under PGD, an upper bound."""
    with np.load(work / "reference.npz") as made:
        right = (made["logits"].argmax(axis=1) == np.tile(y, 2)).reshape(2, -1)[:, :own]
    return {
        "images": own,
        "accuracy": float(right[0].mean()),
        "pgd_10_accuracy": float(right.all(axis=0).mean()),
    }


def _card(path, data, job, told, backend, facts):
    built = told["build"]
    return {
        "format": FORMAT,
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "name": job["name"],
        "source": {
            "file": path.name,
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
            "backend": backend,
            "parameters": built["parameters"],
        },
        "labels": built["labels"],
        "image_shape": list(data.image_shape),
        "data": {
            "name": data.name,
            "sha256": data.fingerprint,
            "expected_range": [0.0, 1.0],
            "training_range": [float(data.x_train.min()), float(data.x_train.max())],
        },
        "threat_model": {"norm": job["norm"], "epsilon": job["epsilon"]},
        "threshold": built["threshold"],
        "trusted": told["gate"]["trusted"],
        "metrics": facts,
        "signatures": built["signatures"],
        "versions": {
            "keras_emr": __version__,
            **{p: metadata.version(p) for p in ("tensorflow", "keras", "numpy")},
        },
    }


def _hashes(folder):
    """SHA-256 of every file of a SavedModel by its path inside."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
    }
