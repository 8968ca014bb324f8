"""``python -m keras_emr_serving.export.worker FOLDER TASK...``: one process of an export."""

from __future__ import annotations

import errno
import json
import os
import sys
import threading
from pathlib import Path

import numpy as np

from keras_emr.errors import UserError
from keras_emr_serving.export import parity
from keras_emr_serving.export.stages import DATA, JOB, MODEL

_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS)
MARGIN_IMAGES = 128  # clean ones whose margins are compared, and as many adversarial ones


def reference(work, job, data):
    """On the backend of training: adversarial images and the source model's logits."""
    from keras_emr_serving.export.reference import reference

    made = reference(
        Path(job["model"]), data["x"], job["epsilon"], job["norm"], job["classes"], seed=job["seed"]
    )
    np.savez(work / "reference.npz", images=made["images"], logits=made["logits"])
    return {"changed": made["changed"]}


def build(work, job, data):
    """On TensorFlow: the SavedModel, its warm-up, and keras_emr's margins to compare with."""
    from keras_emr.evaluation.margins import effective_margins
    from keras_emr.models.loading import load_model
    from keras_emr_serving.export import savedmodel, warmup

    folder, model = work.parent / MODEL, load_model(Path(job["model"]))
    built = savedmodel.build(
        model,
        folder,
        job["labels"],
        data["x_val"],
        data["y_val"],
        job["epsilon"],
        job["norm"],
        job["keep"],
        job["with_attack"],
    )
    with savedmodel.file_errors():
        warmup.write(
            folder,
            job["name"],
            built["signatures"],
            len(built["labels"]),
            data["x_val"][0],
            job["epsilon"],
        )
    with np.load(work / "reference.npz") as made:
        chosen = _margin_index(len(made["images"]))
        images, logits = made["images"][chosen], made["logits"][chosen]
    margins = effective_margins(model, images, logits.argmax(axis=1))
    np.savez(work / "margins.npz", index=chosen, l2=margins.l2, linf=margins.linf)
    return built


def gate(work, job, data):
    """Without Keras: what the SavedModel answers, compared; raises ``ParityError``."""
    from keras_emr_serving.export.gate import isolate, observe
    from keras_emr_serving.export.threshold import trust_summary

    folder = work.parent / MODEL
    xla_off = isolate()
    parity.require_no_xla(folder)
    with np.load(work / "reference.npz") as made, np.load(work / "margins.npz") as margins:
        images, expected, index = made["images"], made["logits"], margins["index"]
        expected_margins = {norm: margins[norm] for norm in ("l2", "linf")}
    got = observe(folder, images, images[index])
    report = {
        "xla_turned_off": xla_off,
        "session": "tf.compat.v1 SavedModel loader",
        "logits": parity.compare_logits(expected, got["logits"], got["class_id"]),
        "robust_logits": parity.compare_logits(expected[index], got["robust_logits"]),
        "effective_margins": {
            norm: parity.compare_margins(mine, got[norm]) for norm, mine in expected_margins.items()
        },
    }
    parity.require_parity(report)
    labels = np.tile(data["y"], 2)[index]
    attacked = index >= len(images) // 2
    right = expected[index].argmax(axis=1) == labels
    shares = trust_summary(got["trusted"], right, attacked)
    return {"parity": report, "trusted": shares}


TASKS = {"reference": reference, "build": build, "gate": gate}


def _margin_index(n):
    """Of ``n`` images, the clean half first: the first few of both halves."""
    few = np.arange(min(MARGIN_IMAGES, n // 2))
    return np.concatenate([few, n // 2 + few])


def _end_with_parent():
    """End this process as soon as the one that started it is gone, even if it was killed."""

    def watch():
        # Not through sys.stdin: its lock, held here, would abort the interpreter's shutdown.
        while os.read(0, 1):
            pass
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def main(folder, *tasks):
    _end_with_parent()
    # What libraries print must not come between: only the result goes to the first descriptor.
    answer = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    work = Path(folder)
    job = json.loads((work / JOB).read_text())
    told = {}
    try:
        with np.load(work / DATA) as data:
            for task in tasks:
                told[task] = TASKS[task](work, job, data)
    except (UserError, parity.ParityError) as error:
        told = {"error": type(error).__name__, "message": str(error)}
    except OSError as error:
        if error.errno not in _DISK:
            raise
        message = f"--to: cannot write there: {error.strerror}. Expected a folder with room for it."
        told = {"error": "UserError", "message": message}
    json.dump(told, answer)
    answer.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
