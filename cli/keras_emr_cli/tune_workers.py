"""Workers of a search: watched by the supervisor, or joining as one."""

from __future__ import annotations

import signal
import socket
import time

import click

from keras_emr.errors import UserError
from keras_emr_cli.tune_processes import LocalWorkers
from keras_emr_cli.tune_search import address, runner, stored_settings

_TICK = 0.2
_DEATHS = 3  # so many of its workers' deaths fail a trial


class WorkersLost(RuntimeError):
    """No worker is left, and the search is not over."""


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
    from keras_emr_cli.main import EXIT_FAILURE, EXIT_RESUMABLE, fail
    from keras_emr_cli.session import require_tuner

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
    from keras_emr_cli.main import EXIT_INTERRUPTED, EXIT_RESUMABLE, fail
    from keras_emr_cli.reporter import Reporter
    from keras_emr_cli.tune_report import line

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
