"""Short trainings whose numbers must not depend on how many devices share a batch.

``python -m tests.distribution.cases OUT.json CASE,CASE [devices=N] [coordinator=H:P processes=P
process=I] [alone=1]`` with KERAS_BACKEND set; without further words on one device, undistributed.
With ``alone`` process 0 does both, one after the other.
"""

import contextlib
import json
import sys

import keras

import keras_emr as ke
from keras_emr import distribution
from keras_emr.data.batches import TrainBatches
from tests.builders import images, network

BATCH, EPSILON = 16, 0.1


def _learned(**options):
    return ke.LearnedAttack(EPSILON, maximizer=ke.LearnedMaximizer(hidden=3), steps=3, **options)


# Name: (BatchNorm, arguments of the classifier, clipping of the optimizer).
CASES = {
    "at": (False, lambda: {"defense": "at", "attack": ke.PGD(EPSILON, steps=2)}, None),
    "trades-emr": (
        False,
        lambda: {
            "defense": ke.TRADES(6.0),
            "attack": ke.PGD(EPSILON, steps=2),
            "regularizers": [
                ke.EffectiveMarginRegularizer(0.1, "sampled", reduction="released"),
            ],
        },
        1.0,
    ),
    "mail": (
        False,
        lambda: {
            "defense": ke.MAIL("trades", normalization="batch", burn_in=0),
            "attack": ke.PGD(2 * EPSILON, "l2", steps=2),
        },
        None,
    ),
    # A maximizer magnifies rounding; the sign in the referee that it would have by default adds a
    # whole step where a gradient is near zero.
    "rnn-trades": (
        False,
        lambda: {
            "defense": "trades",
            "attack": _learned(),
            "eval_attack": ke.PGD(2 * EPSILON, "l2", steps=2),
        },
        None,
    ),
    "around": (
        False,
        lambda: {
            "defense": "at",
            "attack": ke.PGD(EPSILON, steps=2),
            "weight_perturbation": ke.AWP(0.01),
            "averaging": ke.EMA(0.5),
        },
        0.5,
    ),
    "batch-norm": (True, lambda: {"defense": "at", "attack": ke.PGD(EPSILON, steps=2)}, None),
}


def run(name, epochs=4):
    """Rows of numbers: losses and metrics of each epoch (one step), and the last weights' sums."""
    batch_norm, options, clip = CASES[name]
    group = distribution.current()
    x, y = images(BATCH, seed=1)
    # Some losses and draws depend on a batch's size: there all are full.
    x_val, y_val = images(13 if name in ("at", "batch-norm") else 16, seed=2)
    robust = ke.RobustClassifier(network(batch_norm=batch_norm), **options(), seed=3)
    rate = keras.optimizers.SGD(0.1, momentum=0.9, global_clipnorm=clip)
    robust.compile(rate, maximizer_optimizer=keras.optimizers.SGD(0.1, global_clipnorm=1.0))
    batches = TrainBatches(x, y, BATCH, share=group.share if group else (0, 1))
    history = robust.fit(
        batches,
        validation_data=(x_val, y_val),
        validation_batch_size=8,
        epochs=epochs,
        shuffle=False,
        verbose=0,
    ).history
    found = {key: [float(v) for v in values] for key, values in history.items()}
    weights = [*robust.model.weights, *(robust.maximizer.weights if robust.maximizer else [])]
    values = [keras.ops.convert_to_numpy(v.value) for v in weights]
    found["weights"] = [float(abs(v).sum()) for v in values if v.dtype.kind == "f"]
    return found


def main(out, names, *words):
    given = {k: v if k == "coordinator" else int(v) for k, v in (w.split("=") for w in words)}
    alone, names = given.pop("alone", 0), names.split(",")
    with ke.distribute("data", **given) if words else contextlib.nullcontext() as group:
        found = {name: run(name) for name in names}
        main_process = group is None or group.main
    if main_process:
        if alone:
            found = {"shared": found, "alone": {name: run(name) for name in names}}
        with open(out, "w") as file:
            json.dump(found, file)


if __name__ == "__main__":
    main(*sys.argv[1:])
