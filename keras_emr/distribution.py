"""Training on several devices: data parallelism on the backend's own engine."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import keras

from keras_emr import backend
from keras_emr.errors import UserError
from keras_emr.part import one_of, whole
from keras_emr.rendezvous import meet

KINDS = ("data",)
_current = None


@dataclass(frozen=True)
class Distribution:
    """Devices that share each batch; ``process`` of ``processes`` is this one.

    ``devices``: names of the devices of all processes.
    """

    devices: tuple[str, ...]
    processes: int = 1
    process: int = 0

    @property
    def main(self):
        """Whether this process is the one that writes and prints."""
        return self.process == 0

    @property
    def share(self):
        """``(process, processes)``: which rows of each batch this process feeds."""
        # TensorFlow takes a worker's part from the whole batch itself.
        return (0, 1) if backend.NAME == "tensorflow" else (self.process, self.processes)

    def check_batch(self, batch_size):
        """Raise :class:`UserError` unless the devices can share ``batch_size`` evenly."""
        count = len(self.devices)
        if batch_size % count:
            lower, upper = batch_size - batch_size % count, batch_size - batch_size % count + count
            near = f"{lower} or {upper}" if lower else f"{upper}"
            raise UserError(
                f"batch_size: the global batch must divide by the number of devices. Received: "
                f"{batch_size} for {count} devices. Use {near}."
            )


@contextlib.contextmanager
def distribute(
    kind="data", devices=None, coordinator=None, processes=None, process=None, timeout=60.0
):
    """Within the block, models are made for, and trained on, several devices.

    Each batch is shared by the devices; the loss that is trained on, the logged loss and the
    metrics are those of the global batch, and so are MAIL's batch weights, EMR's reduction,
    gradient clipping, AWP and a learned maximizer's update. The noise of attacks does not depend
    on the number of devices. BatchNorm's statistics are the global batch's on jax, those of a
    device's rows on tensorflow and torch, where the moving ones are averaged after each step.

    Make, compile and fit the classifier inside the block::

        with ke.distribute("data") as group:
            robust = ke.RobustClassifier(make(), "at", ke.PGD(8 / 255))
            robust.compile("adam")
            robust.fit(x, y, batch_size=128)

    * jax: ``keras.distribution.DataParallel`` over the devices of this process, or of several,
      each of which feeds its own rows (:attr:`Distribution.share`).
    * tensorflow: ``MirroredStrategy``; with ``TF_CONFIG`` ``MultiWorkerMirroredStrategy``.
    * torch: a process for each device (torchrun's environment, or ``coordinator``), each of which
      feeds its own rows.

    Args:
        kind: ``data``.
        devices: devices of this machine; ``None``: all accelerators, or its CPU. On a machine
            without accelerators several are virtual devices of the CPU, for trials.
        coordinator: ``HOST:PORT`` of process 0 (jax and torch); ``None``: a single process, or
            what the environment says.
        processes, process: how many there are, and which this is; with ``coordinator``.
        timeout: seconds to wait for the other processes.

    Yields:
        :class:`Distribution`.

    Raises:
        UserError: processes that cannot be reached, too few devices, half an address.
    """
    global _current
    one_of("distribute", kind, KINDS)
    if devices is not None:
        whole("devices", devices, 1)
    if (coordinator is None) != (processes is None) or (processes is None) != (process is None):
        raise UserError(
            "distribute: coordinator, processes and process go together. Received: "
            f"coordinator={coordinator!r}, processes={processes!r}, process={process!r}."
        )
    if coordinator is not None:
        whole("processes", processes, 1)
        whole("process", process, 0)
        if process >= processes:
            raise UserError(
                f"process must be below processes. Received: process {process} of {processes}; "
                "they are counted from 0."
            )
        if backend.NAME != "tensorflow":  # whose workers find each other by themselves
            meet(coordinator, processes, process, timeout)
    names, count, index, scope = backend.replicas.start(
        devices, coordinator, processes, process, timeout
    )
    if devices is not None and len(names) < devices * count and backend.NAME != "torch":
        raise UserError(
            f"devices: there are not so many. Received: {devices}. This process sees "
            f"{len(names) // count}: {', '.join(names)}."
        )
    before = _current
    with scope:
        _current = Distribution(tuple(names), count, index)
        try:
            yield _current
        finally:
            _current = before


def current():
    """The :class:`Distribution` of the block around, or ``None``."""
    return _current


def agree(number):
    """The largest ``number``, an int >= 0, of all processes: where one stops, all do."""
    if _current is None or _current.processes == 1:
        return number
    return backend.replicas.agree(number)


def even_batches(x, y, batch_size):
    """Validation data in batches of one size, which the devices can share evenly.

    The rest of the last batch is filled up with copies of the last image, of weight zero; the
    weights of the others make up for it, so that every mean is that over the data.

    Returns:
        A ``keras.utils.PyDataset`` of ``(x, y, weights)``: this process's rows.
    """
    from keras_emr.data.batches import EvenBatches

    group = _current
    count = len(group.devices)
    size = -(-min(batch_size, len(x)) // count) * count
    return EvenBatches(x, y, size, group.share)


def fit_options(x, batch_size, options):
    """What ``fit`` is called with on several devices: arrays in batches that these can share."""
    if _current is None:
        return options
    if not isinstance(x, keras.utils.PyDataset) and hasattr(x, "shape"):
        size = batch_size or 32
        _current.check_batch(size)
        if len(x) % size and not options.get("steps_per_epoch"):
            raise UserError(
                "x: on several devices all batches are full. Received: "
                f"{len(x)} images for batches of {size}. Use keras_emr.data.batches.TrainBatches, "
                "or leave the rest out."
            )
    given = options.get("validation_data")
    if isinstance(given, tuple) and len(given) == 2 and hasattr(given[0], "shape"):
        size = options.pop("validation_batch_size", None) or batch_size or 32
        options = {**options, "validation_data": even_batches(*given, size)}
    return options
