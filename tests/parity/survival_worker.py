"""Which examples survive on one backend: ``survival_worker.py MODEL.keras OUT.npz``.

Trains the model first if there is none. Run with KERAS_BACKEND set.
"""

import sys
from pathlib import Path

import keras
import numpy as np
from keras import layers

import keras_emr as ke
from keras_emr.attacks import ATTACKS

N, EPSILON = 500, 0.08
ATTACKED_WITH = {
    "apgd-ce": lambda: ke.APGD(EPSILON, steps=50),
    "fab": lambda: ATTACKS.get("fab")(EPSILON, steps=20),
}


def trained(data):
    """A small network, trained on examples that it is not judged on."""
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.Input(data.image_shape),
            layers.Conv2D(8, 3, activation="relu"),
            layers.MaxPooling2D(2),
            layers.Flatten(),
            layers.Dense(32, activation="relu"),
            layers.Dense(data.classes),
        ]
    )
    robust = ke.RobustClassifier(model, "at", attack=ke.FGSM(0.1))
    robust.compile(keras.optimizers.Adam(5e-3))
    robust.fit(data.x_train[N:], data.y_train[N:], batch_size=32, epochs=15, verbose=0)
    return model


def main(source, target):
    data = ke.load_data("digits")
    if not Path(source).exists():
        trained(data).save(source)
    model = keras.saving.load_model(source)
    found = {}
    for name, attack in ATTACKED_WITH.items():
        result = ke.evaluate_attack(model, attack(), data.x_train[:N], data.y_train[:N])
        found |= {name: result.robust, "correct": result.correct}
    np.savez(target, backend=keras.backend.backend(), **found)


if __name__ == "__main__":
    main(*sys.argv[1:])
