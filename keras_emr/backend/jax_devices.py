"""JAX over many devices: one program on global arrays (SPMD), so a step needs no word of its own.

The sharding of a batch is the only difference: losses, batch statistics and noise are those of the
global batch as they stand.
"""

import contextlib

import jax
import keras
from jax.experimental import multihost_utils


def start(devices, coordinator, processes, process, timeout):
    """Join the processes, and distribute what is made from now on.

    Args:
        devices: local devices to use; ``None``: all. More than a machine without an accelerator
            has are virtual devices of its CPU.
        coordinator: ``HOST:PORT`` of process 0, or ``None`` for a single process.
        processes, process: how many there are, and which this is.
        timeout: unused: all are there (:mod:`keras_emr.rendezvous`).

    Returns:
        ``(names of the devices of all processes, processes, process, scope)``.
    """
    if devices is not None:
        with contextlib.suppress(RuntimeError):  # too late: the backend has begun
            if jax.config.jax_num_cpu_devices < devices:
                jax.config.update("jax_num_cpu_devices", devices)
    if coordinator is not None:
        keras.distribution.initialize(coordinator, processes, process)
    found = jax.devices()
    if devices is not None:
        local = sorted({d.process_index for d in found})
        found = [d for p in local for d in [d for d in found if d.process_index == p][:devices]]
    names = [f"{d.platform}:{d.id}" for d in found]
    layout = keras.distribution.DataParallel(devices=names, auto_shard_dataset=False)
    return names, jax.process_count(), jax.process_index(), _scope(layout)


@contextlib.contextmanager
def _scope(layout):
    before = keras.distribution.distribution()
    keras.distribution.set_distribution(layout)
    try:
        yield
    finally:
        keras.distribution.set_distribution(before)
        if jax.process_count() > 1:
            jax.distributed.shutdown()  # together: at exit the others would wait for process 0


def agree(number):
    """The largest ``number``, an int >= 0, of all processes."""
    if jax.process_count() == 1:
        return number
    import numpy as np

    return int(multihost_utils.process_allgather(np.int32(number)).max())


def gather(rows):
    """Rows of the global batch: as they are."""
    return rows


def total(gradients):
    """Gradients of the global batch: as they are."""
    return gradients


def mean(value):
    """The mean over the replicas of a scalar: as it is."""
    return value


def whole(loss):
    """The loss of the global batch, as Keras reduced it."""
    return loss


def share_of_rows(rows):
    """``None``: every draw is the global batch's."""


def check_optimizer(optimizer):
    """Nothing to refuse."""


def fraction(rows):
    """``None``: a mean is the global batch's."""


def average_statistics(model):
    """Nothing to do: BatchNorm has seen the global batch."""
