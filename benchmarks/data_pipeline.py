"""Time of training epochs on images read from disk over those in memory.

    python benchmarks/data_pipeline.py --data MNIST-FOLDER [--images 6400] [--rounds 5]

KERAS_BACKEND chooses the backend. Adversarial training (PGD-10) of the small CNN, batches of 128.
The same images in memory, in a folder of PNG files and, with tensorflow-datasets installed, in
prepared data sets of both formats; one epoch of each in turn, in every round. Prints the median
and range of each epoch's time over that of the same round's epoch in memory.
"""

import argparse
import tempfile
import time
from pathlib import Path

import keras
import numpy as np
from PIL import Image

import keras_emr as ke
from keras_emr.data import TrainBatches, load
from keras_emr.data.prepare import prepare
from keras_emr.data.registry import open_source
from keras_emr.errors import UserError


def write_pictures(data, folder, count):
    """The first training images as ``train/CLASS/NUMBER.png``, and a few test images."""
    parts = {"train": (data.x_train[:count], data.y_train[:count])}
    parts["test"] = data.x_test[:200], data.y_test[:200]
    for split, (x, y) in parts.items():
        for i, (image, label) in enumerate(zip(x, y, strict=True)):
            path = folder / split / str(label) / f"{i:06}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.rint(image * 255).astype("uint8").squeeze()).save(path)


def sources(folder, data_dir):
    """Name -> the same data set, read in another way."""
    found = {"memory": load(folder, stream="never"), "folder": load(folder, stream="always")}
    try:
        source = open_source(str(folder))
        for kind in ("array_record", "tfrecord"):
            prepare(source, f"pictures_{kind}", data_dir=data_dir, file_format=kind)
            name = f"tfds:pictures_{kind}"
            found[kind] = load(name, stream="always", tfds_dir=data_dir)
    except UserError as error:
        print(f"without TFDS: {error}")
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--data", required=True)
    parser.add_argument("--images", type=int, default=6400)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    keras.utils.set_random_seed(options.seed)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "pictures"
        write_pictures(load(options.data), folder, options.images)
        found = sources(folder, Path(scratch) / "tfds")
        data = found["memory"]
        model = ke.small_cnn(data.image_shape, data.classes)
        robust = ke.RobustClassifier(model, "at", ke.PGD(0.3, steps=10, step_size=0.075))
        robust.compile(keras.optimizers.Adam(1e-3))
        batches = {n: TrainBatches(d.x_train, d.y_train, 128, seed=0) for n, d in found.items()}
        times = {name: [] for name in found}
        for epoch in range(options.rounds + 1):
            for name in found:
                began = time.perf_counter()
                robust.fit(
                    batches[name], initial_epoch=epoch, epochs=epoch + 1, shuffle=False, verbose=0
                )
                times[name].append(time.perf_counter() - began)
    memory = np.array(times.pop("memory")[1:])  # the first compiles
    print(f"{keras.backend.backend()}, {len(data.x_train)} images, {options.rounds} rounds")
    for name, seconds in times.items():
        ratio = np.array(seconds[1:]) / memory
        low, high = ratio.min(), ratio.max()
        print(f"{name:>12}: {np.median(ratio):.3f} ({low:.3f} to {high:.3f}) of in-memory time")


if __name__ == "__main__":
    main()
