"""Resident memory over 200 short epochs of a run: prints it in MiB after every epoch.

Run with KERAS_BACKEND set, in an empty folder; ``test_memory.py`` reads the list.
"""

import json

import keras

import keras_emr as ke
from keras_emr.data.dataset import from_arrays
from keras_emr.training.averaging import EMA
from tests.builders import images, network
from tests.system.memory_worker import resident

EPOCHS = 200


class Resident(keras.callbacks.Callback):
    def __init__(self):
        super().__init__()
        self.seen = []

    def on_epoch_begin(self, epoch, logs=None):
        self.seen.append(round(resident(), 2))


def main():
    x, y = images(96)
    parts = {"x_train": x[:32], "x_val": x[32:64], "x_test": x[64:]}
    parts |= {"y_train": y[:32], "y_val": y[32:64], "y_test": y[64:]}
    robust = ke.RobustClassifier(
        network(dropout=0.3), "trades", attack=ke.PGD(0.1, steps=1), averaging=EMA(0.9)
    )
    robust.compile("adam")
    measured = Resident()
    options = {"batch_size": 8, "checkpoint_every": "2steps", "callbacks": [measured]}
    ke.train(robust, from_arrays(parts), "run", epochs=EPOCHS, augment="cifar", **options)
    print(json.dumps(measured.seen))


if __name__ == "__main__":
    main()
