"""Several devices and processes, from the command line's side."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

from keras_emr.errors import UserError
from keras_emr_cli.settings import Merged

# Of this process, not of the run.
PLACE = ("coordinator", "processes", "process", "join_timeout")
_ONLY_DISTRIBUTED = ("devices", "coordinator", "processes", "process")


def check(s):
    """Raise :class:`UserError` for settings that make no sense together."""
    if s.distribute != "none":
        return
    for name in _ONLY_DISTRIBUTED:
        if s.values[name] is not None and s.origins.get(name) == "flag":
            raise UserError(
                f"{name}: there is one device without --distribute data. Received: "
                f"{s.values[name]}. Add --distribute data, or leave it out."
            )


def processes_to_start(s):
    """How many processes this one has to start on this machine: 0, or one for each device."""
    if s.distribute == "none" or s.backend != "torch":
        return 0
    if s.coordinator is not None or "RANK" in os.environ:
        return 0
    count = s.devices
    if count is None:
        import torch

        count = torch.cuda.device_count()
    if count < 2:
        return 0
    from keras_emr.distribution import Distribution

    Distribution(("",) * count).check_batch(s.batch_size)  # said once
    return count


def start_processes(count, table, flags, switches):
    """Run this command ``count`` times as one job; returns process 0's exit code.

    Args:
        table, flags: settings, and their raw values where given.
        switches: further arguments.
    """
    words = list(switches)
    for setting in table:
        value = flags.get(setting.name)
        if setting.kind == "bool" and value is not None:
            words.append(f"--{'' if value else 'no-'}{setting.flag[2:]}")
        elif value is not None:
            words += [setting.flag, str(value)]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "keras_emr_cli.main", "train", *words]
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(count)}
    # Each its part of the cores.
    threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // count))}
    children = []
    for rank in range(count):
        own = {**place, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        children.append(subprocess.Popen(command, env={**threads, **os.environ, **own}))
    return _supervise(children)


def _supervise(children):
    """Pass signals on, and end all when one fails."""

    def pass_on(number, frame):
        for child in children:
            if child.poll() is None:
                child.send_signal(number)

    previous = {n: signal.signal(n, pass_on) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        running, failed = set(children), None
        while running:
            for child in list(running):
                with contextlib.suppress(subprocess.TimeoutExpired):
                    code = child.wait(0.2)
                    running.discard(child)
                    if code and failed is None:
                        failed = code
                        _end(running)
        return children[0].returncode if failed is None else max(failed, 1)
    finally:
        for number, old in previous.items():
            signal.signal(number, old)


def _end(children, patience=20.0):
    """Let processes end that are about to, then end them."""
    for child in children:
        try:
            child.wait(patience)
        except subprocess.TimeoutExpired:
            child.kill()


@contextlib.contextmanager
def joined(s, quiet):
    """The run's devices while the block lasts: a :class:`Distribution`, or ``None``; and a leave.

    Yields:
        ``(group, leave)``; ``leave()`` gives the devices up before the block ends.
    """
    if s.distribute == "none":
        yield None, lambda: None
        return
    from keras_emr.distribution import distribute

    place = {name: s.values[name] for name in ("coordinator", "processes", "process")}
    with contextlib.ExitStack() as stack:
        group = stack.enter_context(
            distribute(s.distribute, s.devices, **place, timeout=s.join_timeout)
        )
        group.check_batch(s.batch_size)
        if group.main and not quiet:
            print(_described(group, s.batch_size), file=sys.stderr, flush=True)
        yield group, stack.close


def _described(group, batch_size):
    count = len(group.devices)
    if count == 1:
        return f"distribute: one device ({group.devices[0]}); there is nothing to share"
    names = ", ".join(group.devices[:8]) + (", ..." if count > 8 else "")
    of = f" of {group.processes} processes" if group.processes > 1 else ""
    each = batch_size // count
    return f"distribute: {count} devices{of} ({names}), {each} of the {batch_size} images on each"


@contextlib.contextmanager
def own_folder(group, s):
    """The settings with a folder that this process may write to.

    That is the run's for the main process alone; the others keep theirs in a temporary copy,
    which needs the run's folder on a shared file system when a run is resumed.
    """
    if group is None or group.processes == 1:
        yield s
        return
    from keras_emr.distribution import agree

    with tempfile.TemporaryDirectory(prefix="keras-emr-") as scratch:
        if not group.main:
            copy = Path(scratch) / "run"
            if Path(s.out).is_dir():
                shutil.copytree(s.out, copy)
            s = Merged({**s.values, "out": str(copy)}, s.origins)
        agree(0)  # nobody writes before all have read
        yield s
