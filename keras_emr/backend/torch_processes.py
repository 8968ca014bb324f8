"""torch over many devices: a process each, which sees its rows of every global batch.

The rows that a loss reads (logits, labels, penalties) are gathered, so that every process computes
the loss of the global batch; gradients go through a process's own rows, and their sum over the
processes is the gradient.
"""

import contextlib
import datetime
import os

import torch
import torch.distributed as dist
from keras.src.backend.torch.core import get_device

from keras_emr.errors import UserError


def _many():
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def start(devices, coordinator, processes, process, timeout):
    """Join the processes: by ``coordinator``, or as torchrun's environment says.

    Args:
        devices: processes on this machine, or ``None``; a check only, as each has one device.
        coordinator: ``HOST:PORT`` of process 0, or ``None``.
        processes, process: how many there are, and which this is.
        timeout: seconds to wait for the others.

    Returns:
        ``(names of the devices of all processes, processes, process, scope)``.
    """
    method = f"tcp://{coordinator}" if coordinator else None
    if coordinator is None and "RANK" in os.environ:
        method = "env://"
        processes, process = (_number(name) for name in ("WORLD_SIZE", "RANK"))
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    name = f"cuda:{torch.cuda.current_device()}" if cuda else "cpu"
    if method is None:
        return [name], 1, 0, contextlib.nullcontext()
    if not dist.is_initialized():
        try:
            dist.init_process_group(
                "nccl" if cuda else "gloo",
                init_method=method,
                world_size=processes,
                rank=process,
                timeout=datetime.timedelta(seconds=timeout),
            )
        except (RuntimeError, ValueError) as error:
            where = coordinator or ":".join(
                os.environ.get(key, "?") for key in ("MASTER_ADDR", "MASTER_PORT")
            )
            raise UserError(
                f"distribute: not all processes met within {timeout:g} s "
                f"({type(error).__name__}). Received: coordinator {where!r}, process {process} of "
                f"{processes}. Check that it runs and can be reached from here."
            ) from None
    names = [None] * processes
    dist.all_gather_object(names, name)
    return names, processes, process, _scope()


def _number(name):
    value = os.environ.get(name, "")
    if not value.isdigit():
        raise UserError(
            f"distribute: {name} is no number. Received: {value!r} beside RANK, as torchrun sets "
            "them. Start the processes with torchrun, or unset RANK."
        )
    return int(value)


@contextlib.contextmanager
def _scope():
    try:
        yield
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def agree(number):
    """The largest ``number``, an int >= 0, of all processes."""
    if not _many():
        return number
    value = torch.tensor([number], device=get_device())
    dist.all_reduce(value, dist.ReduceOp.MAX)
    return int(value)


def of_all(value):
    """What each process calls this with, in their order: a list of Python objects."""
    if not _many():
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows):
        counts = _counts(len(rows))
        start = sum(counts[: dist.get_rank()])
        ctx.own = slice(start, start + len(rows))
        padded = rows.new_zeros((max(counts), *rows.shape[1:]))
        padded[: len(rows)] = rows
        parts = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(parts, padded)
        return torch.cat([part[:n] for part, n in zip(parts, counts, strict=True)])

    @staticmethod
    def backward(ctx, gradient):
        return gradient[ctx.own]


def _counts(rows):
    counts = torch.zeros(dist.get_world_size(), dtype=torch.int64, device=get_device())
    counts[dist.get_rank()] = rows
    dist.all_reduce(counts)
    return counts.tolist()


def share_of_rows(rows):
    """``(start, total)`` of this process's ``rows`` in the global batch; ``None`` if alone."""
    if not _many():
        return None
    counts = _counts(rows)
    return sum(counts[: dist.get_rank()]), sum(counts)


def gather(rows):
    """The rows (N, ...) of the global batch, from this process's (n, ...); gradients reach these.

    Args:
        rows: tensor or ``None``.
    """
    if rows is None or not _many():
        return rows
    if rows.dtype == torch.bool:
        return _Gather.apply(rows.to(torch.uint8)).bool()
    return _Gather.apply(rows.contiguous())


def total(gradients):
    """Sums over the processes of a list of tensors or ``None``."""
    if not _many():
        return gradients
    there = [g for g in gradients if g is not None]
    _reduce(there)
    reduced = iter(there)
    return [g if g is None else next(reduced) for g in gradients]


def _reduce(tensors):
    """Replace ``tensors`` by their sums, in one message."""
    wide = torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32
    flat = torch.cat([t.detach().reshape(-1).to(wide) for t in tensors])
    dist.all_reduce(flat)
    parts = flat.split([t.numel() for t in tensors])
    tensors[:] = [p.reshape(t.shape).to(t.dtype) for p, t in zip(parts, tensors, strict=True)]


class _Mean(torch.autograd.Function):
    @staticmethod
    def forward(ctx, value):
        value = value.detach().clone()
        dist.all_reduce(value)
        return value / dist.get_world_size()

    @staticmethod
    def backward(ctx, gradient):
        return gradient / dist.get_world_size()


def mean(value):
    """The mean over the processes of a scalar; gradients through this one's share."""
    return _Mean.apply(value) if _many() and torch.is_tensor(value) else value


def whole(loss):
    """The loss of the global batch, as Keras reduced it."""
    return loss


def check_optimizer(optimizer):
    """Nothing to refuse."""


def fraction(rows):
    """This process's share of the rows of the global batch, in (0, 1]; ``None`` if alone."""
    return rows / sum(_counts(rows)) if _many() else None


def average_statistics(model):
    """Give every process the mean of BatchNorm's moving statistics."""
    if not _many():
        return
    variables = [v for v in model.non_trainable_variables if "float" in str(v.dtype)]
    if variables:
        values = [v.value for v in variables]
        _reduce(values)
        for variable, value in zip(variables, values, strict=True):
            variable.assign(value / dist.get_world_size())


def rank():
    """The number of this process."""
    return dist.get_rank() if _many() else 0
