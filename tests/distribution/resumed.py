"""``python -m tests.distribution.resumed OUT.json WORK coordinator=H:P processes=P process=I``.

Trains with dropout on several processes: without a stop in one folder, and in another, stopped
inside the second epoch and resumed. Process 0 writes what both came to.
"""

import json
import shutil
import sys
from pathlib import Path

import keras
import numpy as np
from keras import layers

import keras_emr as ke
from keras_emr.training.callbacks import Interrupted
from tests.resume.runs import StopAt, data, history


def network():
    # Dropout without a seed of its own draws from torch's stream.
    stack = [keras.Input((6, 6, 1)), layers.Flatten(), layers.Dropout(0.5), layers.Dense(3)]
    return keras.Sequential(stack)


def train(folder, stop=None, resume=False):
    keras.utils.set_random_seed(0)
    robust = ke.RobustClassifier(network(), "at", ke.PGD(0.1, steps=1))
    robust.compile(keras.optimizers.SGD(0.1))
    ke.train(robust, data(), folder, epochs=2, batch_size=4, stop=stop, resume=resume)
    weights = [keras.ops.convert_to_numpy(w.value) for w in robust.model.weights]
    return {
        "history": history(folder),
        "weights": [np.asarray(w, "float64").ravel().tolist() for w in weights],
    }


def main(out, work, *words):
    given = {k: v if k == "coordinator" else int(v) for k, v in (w.split("=") for w in words)}
    work = Path(work)
    with ke.distribute("data", **given) as group:
        mine = [work / f"{name}-{group.process}" for name in ("whole", "parts")]
        whole = train(mine[0])
        try:  # an epoch: six steps, a batch of validation, one of margins, its end
            train(mine[1], StopAt(9 + 3))
            where = None
        except Interrupted as stopped:
            where = stopped.where
        # Checkpoints are process 0's: the others read theirs from it, as the command line does.
        ke.distribution.agree(0)
        if not group.main:
            shutil.rmtree(mine[1])
            shutil.copytree(work / "parts-0", mine[1])
        ke.distribution.agree(0)
        resumed = train(mine[1], resume=True)
        found = {"where": where, "whole": whole, "resumed": resumed}
    if group.main:
        Path(out).write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
