"""Worker processes of a search on this machine: started, restarted, ended; CPUs and GPUs shared."""

from __future__ import annotations

import os
import subprocess
import sys
import time

_BEFORE_RESTART = 3.0  # seconds; all that die within them count as dead at once
_GRACE = 60.0  # seconds that workers get to save after SIGTERM


class LocalWorkers:
    """Worker processes on this machine.

    Args:
        out: folder of the search.
        address: of the chief.
        count: how many.
        logs: folder of their logs.
        restarts: how often each is started again after a crash.
    """

    def __init__(self, out, address, count, logs, restarts):
        self.out, self.address, self.logs = out, address, logs
        self.names = [f"worker-{i + 1}" for i in range(count)]
        self.left = dict.fromkeys(self.names, restarts)
        self.running, self.due, self.finished = {}, {}, set()

    def start(self):
        for name in self.names:
            self._start(name)

    def poll(self):
        """Names and exit codes of those that ended since; those that are due start again."""
        ended = []
        for name, process in list(self.running.items()):
            if process.poll() is None:
                continue
            del self.running[name]
            ended.append((name, process.returncode))
            if process.returncode == 0:
                self.finished.add(name)
            elif self.left[name]:
                self.left[name] -= 1
                self.due[name] = time.monotonic() + _BEFORE_RESTART
        return ended

    def restart_due(self):
        """Start those whose time has come; their names."""
        now = time.monotonic()
        due = [name for name, when in self.due.items() if when <= now]
        for name in due:
            del self.due[name]
            self._start(name)
        return due

    def stop(self, seconds=_GRACE):
        """End all of them: SIGTERM, then SIGKILL."""
        self.due.clear()
        for process in self.running.values():
            process.terminate()
        until = time.monotonic() + seconds
        for process in self.running.values():
            try:
                process.wait(max(0.1, until - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def log(self, name):
        return self.logs / f"{name}.log"

    def last_line(self, name):
        """The last line that a worker wrote, or ``""``."""
        try:
            lines = self.log(name).read_text(errors="replace").split("\n")
        except OSError:
            return ""
        return next((line.strip() for line in reversed(lines) if line.strip()), "")

    def _start(self, name):
        argv = [sys.executable, "-m", "keras_emr_cli.main", "tune", "--out", str(self.out)]
        argv += ["--chief", self.address, "--tuner-id", name]
        index = self.names.index(name)
        with open(self.log(name), "ab") as log:
            self.running[name] = subprocess.Popen(
                argv,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, **share(index, len(self.names))},
                start_new_session=True,  # Ctrl-C is for the supervisor, which passes it on
            )
        cpus = share_of_cpus(index, len(self.names))
        if cpus:  # before its libraries count them for their threads
            os.sched_setaffinity(self.running[name].pid, cpus)


def share_of_cpus(index, workers):
    """The CPUs of one of so many workers: all, where they are too few or the system has no say."""
    if not hasattr(os, "sched_setaffinity"):
        return None
    cpus = sorted(os.sched_getaffinity(0))
    each = len(cpus) // workers
    return set(cpus[index * each : (index + 1) * each]) if each else None


def share(index, workers):
    """Environment of a worker: its threads, and its GPU where there are some."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    threads = str(max(1, (cpus or 1) // workers))
    found = {}
    for name in ("OMP_NUM_THREADS", "TF_NUM_INTRAOP_THREADS", "TF_NUM_INTEROP_THREADS"):
        if name not in os.environ:
            found[name] = threads
    gpus = _gpus()
    if gpus:
        found["CUDA_VISIBLE_DEVICES"] = gpus[index % len(gpus)]
        if workers > len(gpus):
            found |= {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "TF_FORCE_GPU_ALLOW_GROWTH": "true"}
    return found


def _gpus():
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [gpu for gpu in visible.split(",") if gpu.strip() not in ("", "-1")]
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return []
    lines = listed.stdout.splitlines() if listed.returncode == 0 else []
    return [str(i) for i, _ in enumerate(line for line in lines if line.startswith("GPU "))]
