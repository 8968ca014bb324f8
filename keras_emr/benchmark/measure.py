"""Time training steps and the single passes they are made of, all taking turns."""

from __future__ import annotations

import time

import keras
import numpy as np
from keras import ops

from keras_emr import backend
from keras_emr.attacks.base import Objective
from keras_emr.benchmark.jobs import Job
from keras_emr.evaluation.timing import in_turns, quartiles
from keras_emr.losses import widen
from keras_emr.network import Network
from keras_emr.training import cost

# A median of fewer, or quartiles further apart than this, is called unstable.
LEAST_ROUNDS, SPREAD = 5, 0.1
# Side and precision of the matrices whose product stands for what the device can do.
_MATRIX = (8192, "bfloat16") if backend.accelerated() else (1024, "float32")


def measure(
    make_model,
    image_shape,
    jobs,
    batch_size,
    steps,
    epsilon,
    precision="float32",
    attack_precision="float32",
    learn_share=1.0,
    rounds=10,
    seed=0,
    progress=None,
):
    """Times of training steps on random images, beside the least that their passes would take.

    Every job trains a network of its own, all with the same initial weights. The least time of a
    step: its passes (:class:`keras_emr.benchmark.jobs.Least`) times what each takes alone here: a
    forward pass, one with the input gradient, and a standard training step.

    Args:
        make_model: ``() -> Keras classifier``, images (H, W, C) in [0, 1] to logits.
        image_shape: (H, W, C).
        jobs: names of ``keras_emr.benchmark.JOBS``.
        batch_size, steps, epsilon: of every step and its attack.
        precision: a Keras dtype policy, of the outer step.
        attack_precision: ``float32`` or ``bfloat16``, of the attack.
        learn_share: of a learned maximizer, see :class:`keras_emr.LearnedAttack`.
        rounds: rounds that count, >= 1; two before them do not.
        progress: called with rounds done and all of them.

    Returns:
        Plain values: ``flops_per_example`` (forward, to_input, to_weights), ``passes`` and
        ``jobs`` (seconds as quartiles, rates), ``matrix_flops_per_second`` (a product of large
        matrices, in bfloat16 on an accelerator), ``unstable`` (names of figures not to rely on).
    """
    rng = np.random.default_rng(seed)
    x = rng.uniform(size=(batch_size, *image_shape)).astype("float32")
    policy = keras.config.dtype_policy()
    try:
        keras.config.set_dtype_policy(precision)
        plain = make_model()
        y = rng.integers(0, plain.output_shape[-1], batch_size).astype("int32")
        names = ["standard", *(name for name in jobs if name != "standard")]
        start = plain.get_weights()
        timed = _passes(plain, x, y, attack_precision)
        for name in names:
            model = plain if name == "standard" else make_model()
            model.set_weights(start)
            robust = Job(name).classifier(
                model, epsilon, steps, attack_precision, learn_share, seed
            )
            timed[name] = _training_step(robust, x, y)
        shares = Network(plain).shares_passes
        timed["matrix"] = _matrix_product()
        seconds = in_turns(list(timed.values()), rounds, warm_up=2, progress=progress)
    finally:
        keras.config.set_dtype_policy(policy)
    times = {name: quartiles(s) for name, s in zip(timed, seconds, strict=True)}
    least = {name: Job(name).least(steps, shares) for name in jobs}
    return _summary(times, cost.forward_cost(plain, image_shape), least, batch_size, rounds)


def _passes(model, x, y, compute):
    """The passes that an attack makes, as functions that return their seconds.

    Each takes BatchNorm into the convolutions for itself, which an attack does once for all steps.
    """
    network = Network(model)
    labels = ops.convert_to_tensor(y)
    images = ops.convert_to_tensor(x)

    def forward(x):
        return ops.sum(widen(network.frozen(compute=compute)(x)))

    def inner(x):
        # The sum makes the gradient needed without reading it all back.
        frozen = network.frozen(compute=compute)
        value, gradient = Objective(frozen, "cross_entropy", x, labels).value_and_gradient(x)
        return ops.sum(value) + ops.sum(gradient)

    found = {}
    for name, fn in (("forward", forward), ("inner", inner)):
        found[name] = _stopwatch(backend.compiled(fn, model.variables), images)
    return found


def _stopwatch(fn, *args):
    """Seconds until ``fn(*args)`` can be read: a scalar, not bfloat16 (NumPy takes no tensor's)."""

    def run():
        began = time.perf_counter()
        ops.convert_to_numpy(fn(*args))
        return time.perf_counter() - began

    return run


def _training_step(robust, x, y):
    def run():
        began = time.perf_counter()
        robust.train_on_batch(x, y)  # reads the loss back
        return time.perf_counter() - began

    return run


def _matrix_product():
    """A function that returns the seconds per FLOP of a product of large square matrices."""
    size, dtype = _MATRIX
    rng = np.random.default_rng(0)
    a, b = (
        ops.cast(ops.convert_to_tensor(rng.normal(size=(size, size)).astype("float32")), dtype)
        for _ in range(2)
    )
    product = backend.compiled(lambda a, b: ops.sum(widen(ops.matmul(a, b))), [])
    run = _stopwatch(product, a, b)
    return lambda: run() / (2 * size**3)


def _summary(times, forward, jobs, batch, rounds):
    alone = {
        "forward": (times["forward"], forward.flops),
        "inner": (times["inner"], forward.flops + forward.to_input),
        "full": (times["standard"], forward.step),
    }
    peak = 1 / times["matrix"]["median"]

    def described(seconds, flops):
        rate = flops * batch / seconds["median"]
        return {
            "seconds": seconds,
            "images_per_second": batch / seconds["median"],
            "flops": flops * batch,
            "flops_per_second": rate,
            "share_of_matrix_rate": rate / peak,
        }

    found = {}
    for name, least in jobs.items():
        seconds = least.seconds(*(t["median"] for t, _ in alone.values()))
        found[name] = {
            **described(times[name], least.flops(forward)),
            "least_passes": vars(least),
            "least_seconds": seconds,
            "measured_over_least": times[name]["median"] / seconds,
        }
    return {
        "flops_per_example": {
            "forward": forward.flops,
            "to_input": forward.to_input,
            "to_weights": forward.to_weights,
        },
        "passes": {name: described(t, flops) for name, (t, flops) in alone.items()},
        "jobs": found,
        "matrix_flops_per_second": peak,
        "matrix_precision": _MATRIX[1],
        "accelerated": backend.accelerated(),
        "rounds": rounds,
        "unstable": sorted(n for n, t in times.items() if n != "matrix" and _unstable(t, rounds)),
    }


def _unstable(seconds, rounds):
    return rounds < LEAST_ROUNDS or seconds["high"] - seconds["low"] > SPREAD * seconds["median"]
