"""What the tests of this folder train: tiny, with everything that has a state switched on."""

import json
import signal
from pathlib import Path

import keras
import numpy as np

import keras_emr as ke
from keras_emr.attacks.learned import LearnedAttack
from keras_emr.data.dataset import from_arrays
from keras_emr.data.extra import ExtraData
from keras_emr.regularizers.schedules import WarmUp
from keras_emr.training.averaging import EMA
from keras_emr.training.learning_rates import learning_rate
from keras_emr.training.optimizers import SGD, AdamW
from tests.builders import images, network

WARM_UP = 3


def data(n=72):
    """Of n images a third is held out for validation and test each."""
    x, y = images(n)
    third = n // 3
    parts = {"x_train": x[:third], "x_val": x[third : 2 * third], "x_test": x[2 * third :]}
    parts |= {"y_train": y[:third], "y_val": y[third : 2 * third], "y_test": y[2 * third :]}
    return from_arrays(parts)


def classifier(method):
    """``at`` (PGD, momentum, schedule) or ``rnn-trades`` (LSTM maximizer, AdamW); both averaged."""
    shared = {"averaging": EMA(0.5, start=2), "epsilon_schedule": WarmUp(3)}
    if method == "at":
        robust = ke.RobustClassifier(
            network(dropout=0.3),
            "at",
            attack=ke.PGD(0.1, steps=1),
            regularizers=[ke.EffectiveMarginRegularizer(0.02, weighting="rademacher")],
            **shared,
        )
        robust.compile(SGD(learning_rate("cosine", 0.1, 6, 9), momentum=0.9, weight_decay=1e-3))
    else:
        maximizer = ke.LearnedMaximizer(hidden=2, seed=1)
        robust = ke.RobustClassifier(
            network(dropout=0.3),
            "trades",
            attack=LearnedAttack(0.1, maximizer=maximizer, steps=2),
            eval_attack=ke.PGD(0.1, steps=1),
            **shared,
        )
        robust.compile(AdamW(1e-2, weight_decay=1e-3))
    robust.optimizer.build(robust.trainable_variables)
    return robust


def train(robust, folder, n=72, epochs=2, batch_size=4, **options):
    """With augmentation, extra data and, where there is a maximizer, its warm-up."""
    x, y = images(10, seed=5)
    warm_up = WARM_UP if robust.maximizer is not None else 0
    given = {"augment": "cifar", "extra": ExtraData(x, y, 0.25), "maximizer_warmup": warm_up}
    return ke.train(
        robust, data(n), folder, epochs=epochs, batch_size=batch_size, **{**given, **options}
    )


class StopAt:
    """Asks training to stop the k-th time that it looks."""

    def __init__(self, k):
        self.left = k

    @property
    def requested(self):
        self.left -= 1
        return signal.SIGTERM if self.left <= 0 else None


def history(folder):
    """The rows without the times."""
    lines = (Path(folder) / "history.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in lines]


def models(folder):
    """Arrays of everything that the run keeps for use."""
    return {
        f"{path.name}/{i}": value
        for path in sorted(Path(folder).glob("*.keras"))
        for i, value in enumerate(map(np.asarray, keras.saving.load_model(path).get_weights()))
    }
