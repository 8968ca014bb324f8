"""TensorFlow over many devices: replicas of a ``tf.distribute`` strategy.

Inside ``strategy.run`` a replica sees its rows of the global batch. The rows that a loss reads
(logits, labels, penalties) are gathered, so that every replica computes the loss of the global
batch; gradients go through a replica's own rows, and their sum over the replicas is the gradient.
Every replica then changes its copies of the variables alike.
"""

import contextlib
import json
import os
import threading

import keras
import tensorflow as tf

from keras_emr.errors import UserError


def _replica():
    """The replica context where there are several, else ``None``."""
    context = tf.distribute.get_replica_context()
    many = context is not None and context.strategy.num_replicas_in_sync > 1
    return context if many else None


def start(devices, coordinator, processes, process, timeout):
    """A strategy over this machine's devices, or over the workers that ``TF_CONFIG`` names.

    Args:
        devices: local devices to use; ``None``: all. On a machine without a GPU: virtual devices
            of its CPU.
        coordinator: ``None``: TensorFlow's workers find each other by ``TF_CONFIG``.
        processes, process: unused.
        timeout: seconds to wait for the other workers.

    Returns:
        ``(names of the devices of all processes, processes, process, scope)``.
    """
    if coordinator is not None:
        raise UserError(
            f"distribute: TensorFlow has no coordinator. Received: {coordinator!r}. Set TF_CONFIG "
            "for every worker instead, as MultiWorkerMirroredStrategy wants it."
        )
    workers, index = _workers(os.environ.get("TF_CONFIG"))
    gpus = tf.config.list_physical_devices("GPU")
    if len(workers) > 1:
        strategy = _within(timeout, workers, _multi_worker)
        names = [f"{kind}@{address}" for address in workers for kind in _local(gpus)]
        return names, len(workers), index, strategy.scope()
    names = _local(gpus)
    if devices is not None and not gpus:
        names = _virtual(devices)
    names = names[:devices]
    # The default on GPUs; NCCL's counterpart for CPUs fails on BatchNorm's gradients.
    reduction = None if gpus else tf.distribute.ReductionToOneDevice()
    strategy = tf.distribute.MirroredStrategy(names, cross_device_ops=reduction)
    return names, 1, 0, strategy.scope()


def _workers(config):
    """Addresses of all workers and the number of this one, as ``TF_CONFIG`` has them."""
    if not config:
        return [], 0
    try:
        task = json.loads(config)
        workers, index = task["cluster"]["worker"], task["task"]["index"]
        if task["task"]["type"] == "worker" and workers[index]:
            return workers, index
    except (ValueError, KeyError, IndexError, TypeError):
        pass
    raise UserError(
        f"distribute: TF_CONFIG is not that of a worker. Received: {config!r}. Expected such as "
        '{"cluster": {"worker": ["HOST:PORT", ...]}, "task": {"type": "worker", "index": 0}}.'
    )


def _multi_worker():
    # NCCL where there are GPUs.
    return tf.distribute.MultiWorkerMirroredStrategy()


def _local(gpus):
    return [f"GPU:{i}" for i in range(len(gpus))] or ["CPU:0"]


def _virtual(count):
    """``count`` logical CPU devices; as many as there are if TensorFlow has begun already."""
    (cpu, *_) = tf.config.list_physical_devices("CPU")
    with contextlib.suppress(RuntimeError):
        parts = [tf.config.LogicalDeviceConfiguration() for _ in range(count)]
        tf.config.set_logical_device_configuration(cpu, parts)
    return [f"CPU:{i}" for i in range(len(tf.config.list_logical_devices("CPU")))]


def _within(seconds, workers, make):
    """``make()``, which has no timeout of its own."""
    made, failed = [], []

    def attempt():
        try:
            made.append(make())
        except Exception as error:
            failed.append(" ".join(str(error).split())[:200])

    thread = threading.Thread(target=attempt, daemon=True)
    thread.start()
    thread.join(seconds)
    if failed:
        raise UserError(
            f"distribute: the workers cannot be joined: {failed[0]} Received: TF_CONFIG with "
            f"{', '.join(workers)}. Check the addresses and ports."
        )
    if not made:
        raise UserError(
            f"distribute: not all workers met within {seconds:g} s. Received: TF_CONFIG with "
            f"{', '.join(workers)}. Check that each runs and can be reached from here."
        )
    return made[0]


def several_hosts():
    """Whether the strategy in force spans several processes."""
    strategy = tf.distribute.get_strategy()
    return isinstance(strategy, tf.distribute.MultiWorkerMirroredStrategy)


def logs(results):
    """A step's results as Keras can reduce them: between hosts along their first axis."""
    if not several_hosts():
        return results
    return {name: tf.reshape(value, (1,)) for name, value in results.items()}


def agree(number):
    """The largest ``number``, an int >= 0, of all processes."""
    if not several_hosts():
        return number
    strategy = tf.distribute.get_strategy()
    workers = strategy.gather(
        strategy.experimental_distribute_values_from_function(
            lambda _: tf.constant([number], "int32")
        ),
        axis=0,
    )
    return int(tf.reduce_max(workers))


def _rows(context, rows):
    """``(all rows, start of this replica's)``."""
    count = tf.identity(tf.shape(rows)[:1])
    counts = context.all_gather(count, axis=0)
    start = tf.reduce_sum(counts[: context.replica_id_in_sync_group])
    # A copy: on this replica's device, which results of a loop need not be.
    together = context.all_gather(tf.identity(rows), axis=0)
    together.set_shape([None, *rows.shape[1:]])  # forgotten between hosts
    return together, start


def share_of_rows(rows):
    """``(start, total)`` of this replica's ``rows`` in the global batch; ``None`` if alone."""
    context = _replica()
    if context is None:
        return None
    count = tf.identity(tf.reshape(tf.cast(rows, "int32"), (1,)))
    counts = context.all_gather(count, axis=0)
    return tf.reduce_sum(counts[: context.replica_id_in_sync_group]), tf.reduce_sum(counts)


def gather(rows):
    """The rows (N, ...) of the global batch, from this replica's (n, ...); gradients reach these.

    Args:
        rows: tensor or ``None``.
    """
    context = _replica()
    if rows is None or context is None:
        return rows
    rows = tf.convert_to_tensor(rows)
    if rows.dtype == tf.bool:
        return tf.cast(gather(tf.cast(rows, "int32")), "bool")

    @tf.custom_gradient
    def gathered(rows):
        together, start = _rows(context, rows)
        count = tf.shape(rows)[0]
        return together, lambda gradient: gradient[start : start + count]

    return gathered(rows)


def total(gradients):
    """Sums over the replicas of a list of tensors or ``None``."""
    context = _replica()
    if context is None:
        return gradients
    there = [tf.identity(g) for g in gradients if g is not None]
    reduced = iter(context.all_reduce(tf.distribute.ReduceOp.SUM, there))
    return [g if g is None else next(reduced) for g in gradients]


def mean(value):
    """The mean over the replicas of a scalar; gradients through this one's share."""
    context = _replica()
    if context is None or not tf.is_tensor(value):
        return value

    @tf.custom_gradient
    def averaged(value):
        share = 1.0 / context.num_replicas_in_sync
        together = context.all_reduce(tf.distribute.ReduceOp.MEAN, value)
        return together, lambda gradient: gradient * tf.cast(share, gradient.dtype)

    return averaged(value)


def whole(loss):
    """The loss of the global batch: Keras has divided it by the number of replicas."""
    context = _replica()
    return loss if context is None else loss * tf.cast(context.num_replicas_in_sync, loss.dtype)


def check_optimizer(optimizer):
    """Raise :class:`UserError` for one that several replicas cannot use."""
    many = tf.distribute.get_strategy().num_replicas_in_sync > 1
    if many and isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
        raise UserError(
            "distribute: tensorflow cannot scale losses on several devices. Received: "
            "precision mixed_float16. Use mixed_bfloat16, or another backend."
        )


def apply(optimizer, gradients, variables):
    """One optimizer step on gradients that are the same on all replicas."""
    if _replica() is not None:
        # Keras would sum over the replicas once more, and has clipped before that.
        optimizer._all_reduce_sum_gradients = list
    optimizer.apply_gradients(zip(gradients, variables, strict=True))


def fraction(rows):
    """This replica's share of the rows of the global batch, in (0, 1]; ``None`` if alone."""
    share = share_of_rows(rows)
    return None if share is None else tf.cast(rows, "float32") / tf.cast(share[1], "float32")


def average_statistics(model):
    """Give every replica the mean of BatchNorm's moving statistics."""
    context = _replica()
    if context is None:
        return
    variables = [v for v in model.non_trainable_variables if "float" in str(v.dtype)]
    if variables:
        values = [tf.convert_to_tensor(v) for v in variables]
        means = context.all_reduce(tf.distribute.ReduceOp.MEAN, values)
        for variable, value in zip(variables, means, strict=True):
            variable.assign(value)
