"""Time of a jointly trained step with a learned maximizer, as a ratio to the PGD step.

    KERAS_BACKEND=tensorflow python benchmarks/maximizer_cost.py [--cell lstm] [--image 28x28x1]

Small CNN, AT, both trained through ``train_on_batch`` with the same number of attack steps, the
two taking turns in one process. Prints the median of the ratios of neighbouring steps and its
quartiles. On a CPU set what the command line sets for itself: on tensorflow
``TF_ENABLE_ONEDNN_OPTS=1``, with jaxlib 0.10 ``XLA_FLAGS="--xla_cpu_experimental_ynn_fusion_type=
--xla_cpu_enable_concurrency_optimized_scheduler=false"``, on torch (glibc)
``MALLOC_TRIM_THRESHOLD_=2147483647 MALLOC_MMAP_THRESHOLD_=33554432``.
"""

import argparse

import keras
import numpy as np

import keras_emr as ke
from keras_emr.evaluation.timing import ratios


def classifier(attack, shape, learning_rate=1e-3):
    keras.utils.set_random_seed(0)
    robust = ke.RobustClassifier(ke.small_cnn(shape, 10), "at", attack=attack)
    robust.compile(keras.optimizers.Adam(learning_rate))
    return robust


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--cell", default="lstm", choices=("lstm", "rnn"))
    parser.add_argument("--image", default="28x28x1")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=20)
    options = parser.parse_args()
    shape = tuple(int(side) for side in options.image.split("x"))
    rng = np.random.default_rng(0)
    x = rng.uniform(size=(options.batch, *shape)).astype("float32")
    y = rng.integers(0, 10, options.batch)
    learned = ke.LearnedAttack(0.3, maximizer=options.cell, steps=options.steps)
    pair = (classifier(ke.PGD(0.3, steps=options.steps), shape), classifier(learned, shape))
    found, seconds = ratios(*pair, x, y, options.rounds)
    low, middle, high = np.percentile(found, (25, 50, 75))
    print(
        f"{keras.backend.backend()} {options.cell} {options.image} batch {options.batch} "
        f"T={options.steps}: learned / PGD {middle:.2f} (quartiles {low:.2f} to {high:.2f}, "
        f"{options.rounds} rounds); PGD step {np.median(seconds[:, 0]):.3f} s"
    )


if __name__ == "__main__":
    main()
