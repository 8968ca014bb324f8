"""Resident memory while 10,000 images are attacked: prints it in MiB after every batch.

What the C library keeps of freed blocks is given back first: it depends on their sizes and on
threads, comes and goes by tens of MiB, and is no memory that the attacks hold.

Run with KERAS_BACKEND set; ``test_memory.py`` reads the list.
"""

import ctypes
import json
from pathlib import Path

import keras
import numpy as np
from keras import layers

import keras_emr as ke
from keras_emr.attacks import ATTACKS
from keras_emr.evaluation.target import auto_batch_size

N, SHAPE = 10_000, (28, 28, 1)


LIBC = ctypes.CDLL(None)


def resident():
    if hasattr(LIBC, "malloc_trim"):  # glibc's
        LIBC.malloc_trim(0)
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 2**20


def main():
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.Input(SHAPE),
            layers.Conv2D(8, 3, strides=2, activation="relu"),
            layers.Flatten(),
            layers.Dense(10),
        ]
    )
    x = np.random.default_rng(0).uniform(size=(N, *SHAPE)).astype("float32")
    y = model.predict(x, batch_size=500, verbose=0).argmax(axis=1)
    attacks = [
        ke.APGD(1 / 255, steps=3),
        ATTACKS.get("fab-t")(1 / 255, steps=2, targets=1),
        ATTACKS.get("square")(1 / 255, steps=5),
    ]
    seen = []

    def progress(name, done, total):
        seen.append([name, round(resident(), 1)])

    suite = ke.AutoAttack(1 / 255, attacks=attacks)
    size = auto_batch_size(model, SHAPE)
    result = suite.run(model, x, y, batch_size=size, state="state.npz", progress=progress)
    ke.effective_margins(model, result.x_adv, y, size)
    seen.append(["margins", round(resident(), 1)])
    print(json.dumps({"batch_size": size, "n": len(result.robust), "resident": seen}))


if __name__ == "__main__":
    main()
