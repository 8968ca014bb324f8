"""``keras-emr train --dry-run``: what a run would need, measured on its first steps."""

from __future__ import annotations

import json
import math
import time

import click
import keras

_WARM_UP, _TIMED = 2, 3
_HOW = {
    "memory": "counted: weights, gradients, optimizer, averages, images, and the layers' outputs "
    "in every pass that is kept for the way back; not counted: workspaces of the libraries",
    "flops": "2 per multiply-add of convolutions and dense layers, by their shapes, times the "
    "passes of a step: 1 forwards, 1 back to the image, 2 back to the weights, 3 for an input "
    "gradient that is differentiated again",
    "time": f"mean of {_TIMED} steps on this data after {_WARM_UP} (which compile), and of one "
    "batch of validation; without the baseline, the final evaluation and saving",
}


class _Stopwatch(keras.callbacks.Callback):
    """Seconds of each training step, its result read back."""

    def __init__(self):
        super().__init__()
        self.seconds = []

    def on_train_batch_begin(self, batch, logs=None):
        self._began = time.perf_counter()

    def on_train_batch_end(self, batch, logs=None):
        for value in (logs or {}).values():
            float(value)
        self.seconds.append(time.perf_counter() - self._began)


def describe(settings, data, extra, robust, group):
    """What the run would need: plain values for JSON. Nothing is written."""
    from keras_emr import backend
    from keras_emr.data.batches import TrainBatches
    from keras_emr.training import cost
    from keras_emr_cli.build import mixing

    share = group.share if group else (0, 1)
    batches = TrainBatches(
        data.x_train,
        data.y_train,
        settings.batch_size,
        settings.seed,
        settings.augment,
        extra,
        mixing(settings, data),
        replays=robust.defense.replays,
        numbered=robust.defense.needs_margins,
        share=share,
    )
    devices = list(group.devices) if group else backend.devices()
    count = len(group.devices) if group else 1
    each = batches.batch_size // count
    seconds, validation = _timed(robust, batches, data, group)
    x, y = keras.tree.map_structure(lambda a: keras.ops.convert_to_tensor(a[:1]), batches[0])
    forward = cost.forward_cost(robust.model, data.image_shape)
    passes = cost.step_passes(robust, x, y)
    per_example = forward.flops * passes.in_forward_passes
    per_example += cost.maximizer_flops(robust, data.image_shape)
    if robust.teacher is not None:  # forwards, and backwards to its weights
        per_example += 3 * cost.forward_cost(robust.teacher, data.image_shape).flops
    memory = cost.memory(robust, data.image_shape, each, forward, passes)
    warm_up = settings.maximizer_warmup if robust.maximizer is not None else 0
    steps = len(batches) * settings.epochs + warm_up
    hours = (steps * seconds + settings.epochs * validation) / 3600
    trainable = cost.parameters(robust.model.trainable_variables)
    found = {
        "dry_run": True,
        "backend": settings.backend,
        "devices": devices,
        "processes": group.processes if group else 1,
        "batch_size": batches.batch_size,
        "batch_size_per_device": each,
        "parameters": {
            "trainable": trainable,
            "not_trainable": cost.parameters(robust.model.variables) - trainable,
            "maximizer": cost.parameters(robust.maximizer.variables) if robust.maximizer else 0,
        },
        "memory_bytes_per_device": memory,
        "forward_flops_per_example": forward.flops,
        "passes_per_step": {
            "forward": passes.forward,
            "backward_to_image": passes.to_input,
            "backward_to_weights": passes.to_weights,
            "differentiated_gradients": passes.double,
            "in_forward_passes": passes.in_forward_passes,
        },
        "flops_per_step": per_example * batches.batch_size,
        "steps_per_epoch": len(batches),
        "epochs": settings.epochs,
        "seconds_per_step": round(seconds, 6),
        "seconds_per_validation": round(validation, 6),
        "expected_hours": round(hours, 6),
        "run": settings.out,
        "how": _HOW,
    }
    return found


def _timed(robust, batches, data, group):
    """Seconds of a step, and of a whole validation."""
    from keras_emr.data.batches import EvalBatches, EvenBatches

    watch = _Stopwatch()
    wanted, epoch = _WARM_UP + _TIMED, 0
    while len(watch.seconds) < wanted:
        steps = min(wanted - len(watch.seconds), len(batches))
        robust.fit(
            batches,
            steps_per_epoch=steps,
            initial_epoch=epoch,
            epochs=epoch + 1,
            shuffle=False,
            verbose=0,
            callbacks=[watch],
        )
        epoch += 1
    size = min(256, len(data.x_val))
    if group:
        count = len(group.devices)
        size = -(-size // count) * count
        batch = EvenBatches(data.x_val[:size], data.y_val[:size], size, group.share)
    else:
        batch = EvalBatches(data.x_val[:size], data.y_val[:size], size)
    for _ in range(2):
        began = time.perf_counter()
        robust.evaluate(batch, verbose=0)
        validation = time.perf_counter() - began
    per_step = sum(watch.seconds[-_TIMED:]) / _TIMED
    return per_step, validation * math.ceil(len(data.x_val) / size)


def show(found, as_json):
    """Print it: JSON, or lines."""
    if as_json:
        click.echo(json.dumps(found, indent=2))
        return
    parameters, passes = found["parameters"], found["passes_per_step"]
    memory = found["memory_bytes_per_device"]
    parts = ", ".join(f"{k} {_bytes(v)}" for k, v in memory.items() if v and k != "total")
    learned = f", maximizer {parameters['maximizer']:,}" if parameters["maximizer"] else ""
    of = f" in {found['processes']} processes" if found["processes"] > 1 else ""
    rows = {
        "backend": found["backend"],
        "devices": f"{len(found['devices'])}{of}: {', '.join(found['devices'])}",
        "batch": f"{found['batch_size']} images, {found['batch_size_per_device']} on each device",
        "parameters": f"{parameters['trainable']:,} trainable, {parameters['not_trainable']:,} not"
        + learned,
        "memory": f"about {_bytes(memory['total'])} on each device ({parts})",
        "FLOPs": f"{found['flops_per_step']:.3g} a step: {found['forward_flops_per_example']:.3g} "
        f"forwards for an image, {passes['in_forward_passes']} such passes "
        f"({passes['forward']} forwards, {passes['backward_to_image']} back to the image, "
        f"{passes['backward_to_weights']} back to the weights, "
        f"{passes['differentiated_gradients']} gradients differentiated)",
        "steps": f"{found['steps_per_epoch']} an epoch, {found['epochs']} epochs",
        "time": f"{found['seconds_per_step']:.3g} s a step, "
        f"{found['seconds_per_validation']:.3g} s a validation: "
        f"about {_hours(found['expected_hours'])} in all",
        "run": f"{found['run']} (nothing was written)",
    }
    for name, text in rows.items():
        click.echo(f"{name:<11} {text}")
    for name, text in found["how"].items():
        click.echo(f"{name}: {text}.")


def _hours(hours):
    return f"{hours:.2f} h" if hours >= 0.1 else f"{hours * 60:.1f} min"


def _bytes(number):
    for unit in ("B", "KiB", "MiB"):
        if number < 1024:
            return f"{number:.0f} {unit}"
        number /= 1024
    return f"{number:.1f} GiB"
