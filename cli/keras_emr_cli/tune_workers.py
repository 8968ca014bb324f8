"""Workers of a search: started and watched here, or joining from elsewhere."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time

import click

from keras_emr.errors import UserError

_TICK = 0.2
_BEFORE_RESTART = 3.0  # seconds; all that die within them count as dead at once
_GRACE = 60.0  # seconds that workers get to save after SIGTERM
_DEATHS = 3  # so many of its workers' deaths fail a trial


class WorkersLost(RuntimeError):
    """No worker is left, and the search is not over."""


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


def supervise(settings, study, folder, stop, reporter, on_end):
    """Serve ``study`` until its trials have ended, whatever happens to the workers.

    Raises:
        WorkersLost: no worker is left, here or elsewhere.
        SearchFailed: trial after trial failed.
        Interrupted: ``stop`` was tripped; the workers have saved and ended.
    """
    from keras_emr.training.callbacks import Interrupted
    from keras_emr.tuning.chief import Chief
    from keras_emr.tuning.trials import read_result
    from keras_emr_cli.tune import address

    def ended(name):
        result = read_result(folder.trials / name)
        if result is not None:
            on_end(result)

    host, port = address(settings.chief) if settings.chief else ("127.0.0.1", 0)
    chief = Chief(study, host, port, folder.id, ended)
    near = "127.0.0.1" if host in ("0.0.0.0", "[::]") else host
    local = LocalWorkers(
        folder.path,
        f"{near}:{chief.port}",
        settings.workers,
        folder.logs,
        settings.restarts_per_worker,
    )
    reporter.say(f"chief at {host}:{chief.port}, {settings.workers} workers here")
    deaths = {}
    try:
        local.start()
        until = time.monotonic() + settings.worker_timeout
        while not (chief.over and not study.waiting):
            if stop.requested is not None:
                raise Interrupted(stop.requested)
            _bury(chief, local, study, folder, deaths, reporter, ended)
            _require_success(study, folder)
            alive = set(local.running) | (chief.alive() - set(local.names))
            if not alive and (settings.workers or chief.seen or time.monotonic() > until):
                raise WorkersLost(_obituary(local, chief))
            for name in local.restart_due():
                reporter.say(f"{name} is started again")
            time.sleep(_TICK)
        _let_go(local)
    finally:
        local.stop()
        chief.stop()


def _bury(chief, local, study, folder, deaths, reporter, ended):
    """Give the trials of workers that are gone to others; fail those that kill their workers."""
    gone = {name: f"exit code {code}" for name, code in local.poll()}
    released = {name: chief.gone(name) for name in gone}
    released |= {name: trial for name, trial in chief.lapsed().items() if name not in gone}
    for name, trial in released.items():
        how = gone.get(name, "no sign of life")
        if how == "exit code 0" and trial is None:
            continue
        taken = "" if trial is None else f"; trial {trial} goes on with another worker"
        reporter.say(f"{name} is gone ({how}){taken}")
        if trial is None:
            continue
        deaths[trial] = deaths.get(trial, 0) + 1
        if deaths[trial] >= _DEATHS:
            _give_up(study, folder, trial, how)
            ended(trial)


def _give_up(study, folder, name, how):
    from dataclasses import asdict

    from keras_emr.training.run_folder import RunFolder
    from keras_emr.tuning.trials import Result

    text = f"{_DEATHS} workers ended in it, the last with {how}"
    result = Result(name, "failed", study.values(name), message=text)
    RunFolder.write_json(folder.trials / name / "result.json", asdict(result))
    study.end(int(name), None)


def _require_success(study, folder):
    from keras_emr.tuning.search import FAILURES, require_success
    from keras_emr.tuning.trials import read_result

    last = [read_result(folder.trials / name) for name in study.ended()[-FAILURES:]]
    if last and not any(result is None or result.ok for result in last):
        require_success(last)


def _obituary(local, chief):
    if not local.names:
        return "no worker is there" if not chief.seen else "the last worker is gone"
    text = "all workers are gone"
    name = next((name for name in local.names if name not in local.finished), None)
    if name is None:
        return text
    last = local.last_line(name).removeprefix("Error: ")
    return f"{text}. Last line of {local.log(name)}: {last}" if last else text


def _let_go(local, seconds=20.0):
    """Wait for the workers, who were told that the search is over."""
    until = time.monotonic() + seconds
    while local.running and time.monotonic() < until:
        local.poll()
        time.sleep(_TICK)


def work(flags, name, quiet):
    """Be worker ``name`` of the search in ``--out``; the exit code."""
    from keras_emr_cli.main import EXIT_FAILURE, fail
    from keras_emr_cli.session import require_tuner
    from keras_emr_cli.tune import EXIT_RESUMABLE, address, stored_settings

    if flags["out"] is None:
        raise click.UsageError("--tuner-id needs --out, the folder of the search")
    for other, value in flags.items():
        if value is not None and other not in ("out", "chief"):
            raise UserError(
                f"--{other.replace('_', '-')}: a worker has the search's settings. Received: "
                f"{value!r} beside --tuner-id. Leave it out."
            )
    _, port = address(flags["chief"])
    unreachable = _unreachable(flags["chief"].rpartition(":")[0], port)
    if unreachable:
        return fail(
            f"--chief: no answer from {flags['chief']} ({unreachable}). Is `keras-emr tune "
            "--workers N --chief HOST:PORT` running there, on an address that this host reaches?",
            EXIT_FAILURE,
        )
    from keras_emr.tuning.folder import SearchFolder

    folder = SearchFolder(flags["out"])
    if not folder.is_search():
        raise UserError(
            f"--out: not the folder of a search. Received: {flags['out']!r}. Workers share the "
            "chief's folder."
        )
    settings, _, _ = stored_settings(folder.path)
    require_tuner(settings.search)
    try:
        return _work(settings, folder, flags["chief"], name, quiet)
    except _Lost as lost:
        text = f"{lost}; its trial goes on with another worker, or when the search is resumed"
        return fail(text, EXIT_RESUMABLE)


class _Lost(RuntimeError):
    pass


def _work(settings, folder, chief, name, quiet):
    from keras_emr_cli.session import select_backend, signals_to

    select_backend(settings.backend)  # before anything imports keras
    from keras_emr.training.callbacks import Interrupted, StopOnSignal
    from keras_emr.tuning.search import search
    from keras_emr.tuning.worker import ChiefLost, RemoteStudy
    from keras_emr_cli.load_data import load_data
    from keras_emr_cli.main import EXIT_INTERRUPTED, fail
    from keras_emr_cli.reporter import Reporter
    from keras_emr_cli.tune import EXIT_RESUMABLE
    from keras_emr_cli.tune_report import line
    from keras_emr_cli.tune_run import runner

    stop, reasons = StopOnSignal(), []

    def lost(reason):
        reasons.append(reason)
        stop.requested = signal.SIGTERM

    data = load_data(settings, settings.validation)
    try:
        with Reporter(quiet) as reporter, signals_to(stop):
            study = RemoteStudy(chief, name, folder.id, lost)
            run = runner(settings, folder, data, stop, reporter)

            def checked(trial):
                if stop.requested is not None:
                    raise Interrupted(stop.requested)
                return run(trial)

            # How many failures are too many is for the chief to say.
            told = lambda result: reporter.say(line(result, settings))  # noqa: E731
            search(study, checked, told, failures=float("inf"))
            study.close()
    except ChiefLost as error:
        raise _Lost(str(error)) from None
    except Interrupted as error:
        if reasons:
            raise _Lost(reasons[0]) from None
        number = signal.Signals(error.signal_number)
        code = EXIT_INTERRUPTED if number == signal.SIGINT else EXIT_RESUMABLE
        return fail(f"interrupted ({number.name}); {name}'s trial can go on", code)
    return 0


def _unreachable(host, port, seconds=20.0):
    """Why nothing listens there, after trying for a while; ``None``: something does."""
    until = time.monotonic() + seconds
    while True:
        try:
            socket.create_connection((host.strip("[]"), port), timeout=5).close()
            return None
        except OSError as error:
            if time.monotonic() >= until:
                return error.strerror or str(error) or type(error).__name__
        time.sleep(0.5)
