"""A search from its first trial to its table, in this process or with workers."""

from __future__ import annotations

import yaml

from keras_emr.errors import NotWritten
from keras_emr_cli.load_data import load_data
from keras_emr_cli.session import select_backend, signals_to
from keras_emr_cli.tune_report import conclude, line
from keras_emr_cli.tune_search import interrupted, runner


def run(settings, space, text, serves, resume, overwrite, as_json, quiet):
    """Search, judge the finalists, report; the exit code.

    Args:
        settings: merged.
        space: parameters, see :func:`keras_emr_cli.tune_space.read_space`.
        text: the space file's.
        serves: whether workers of other hosts are waited for.
        resume, overwrite, as_json, quiet: flags.
    """
    from keras_emr.tuning.folder import SearchFolder

    folder = SearchFolder(settings.out)
    folder.check(resume, overwrite)
    select_backend(settings.backend)
    from keras_emr.tuning.trials import locked

    data = load_data(settings, settings.validation)
    _build_one(settings, space, data)
    if resume:
        _require_same_data(folder, data)
    folder.prepare(overwrite)
    with locked(folder.path, seconds=1):
        _describe(folder, settings, text, data)
        return _run(settings, space, folder, data, serves, resume, as_json, quiet)


def _run(settings, space, folder, data, serves, resume, as_json, quiet):
    from keras_emr.training.callbacks import Interrupted, StopOnSignal
    from keras_emr.tuning.search import SearchFailed
    from keras_emr_cli.main import EXIT_FAILURE, fail
    from keras_emr_cli.reporter import Reporter
    from keras_emr_cli.tune_workers import WorkersLost, supervise

    stop = StopOnSignal()
    try:
        with Reporter(quiet) as reporter, signals_to(stop):
            study = make_study(settings, space, folder)
            if resume:
                study.retry_failed()

            def on_end(result):
                reporter.say(line(result, settings))

            if settings.workers or serves:
                supervise(settings, study, folder, stop, reporter, on_end)
            else:
                _search_here(settings, study, folder, data, stop, reporter, on_end)
            report = conclude(settings, space, folder, data, stop, reporter)
    except Interrupted as error:
        return interrupted(error.signal_number, folder.path)
    except NotWritten as error:
        again = f"keras-emr tune --out {folder.path} --resume"
        return fail(f"{error} Make room, then continue with: {again}", EXIT_FAILURE)
    except (SearchFailed, WorkersLost) as error:
        text = [str(error).rstrip(".")]
        if isinstance(error, SearchFailed) and (traces := sorted(folder.errors.glob("*.txt"))):
            text.append(f"More in {traces[0]}")
        text.append(f"Then go on with: keras-emr tune --out {folder.path} --resume")
        return fail(". ".join(text), EXIT_FAILURE)
    from keras_emr_cli.tune_report import show

    show(report, settings, as_json)
    return 0 if report["trials"] else EXIT_FAILURE


def _search_here(settings, study, folder, data, stop, reporter, on_end):
    from keras_emr.tuning.search import search

    search(study, runner(settings, folder, data, stop, reporter), on_end)


def make_study(settings, space, folder):
    """KerasTuner's oracle, with the state in the folder."""
    from keras_emr.tuning.kerastuner import KerasTunerStudy

    trials = settings.max_trials
    if settings.search == "hyperband":
        hyperband = {"max_epochs": settings.epochs, "factor": settings.factor}
        hyperband["iterations"] = settings.iterations
    else:
        hyperband, trials = {}, trials or 20
    return KerasTunerStudy(
        settings.search,
        space,
        settings.objective,
        folder.state,
        seed=settings.seed,
        max_trials=trials,
        **hyperband,
    )


def _build_one(settings, space, data):
    """Build the first corner of the space: what no trial could do is said before any."""
    from keras_emr.tuning.trials import memory_released
    from keras_emr_cli.build import classifier
    from keras_emr_cli.tune_trial import (
        TrainTrial,
        first_values,
        referee,
        strong_attack,
        trial_settings,
    )

    s = trial_settings(settings, first_values(space))
    with memory_released():
        extra = TrainTrial(settings, data, None, None).extra(s)
        classifier(s, data, extra=extra, referee=referee(settings))
        strong_attack(settings)


def _describe(folder, settings, text, data):
    from keras_emr.training.run_folder import RunFolder, describe_environment
    from keras_emr_cli.settled import settled

    if not folder.is_search():
        folder.begin()
    plain = settled(settings).plain()
    for name in ("out", "space"):
        plain.pop(name)
    write = RunFolder.write_text
    write(folder.config, yaml.safe_dump(plain, sort_keys=False))
    write(folder.space, text)
    facts = {"data": data.name, "data_sha256": data.fingerprint, "backend": settings.backend}
    RunFolder.write_json(folder.environment, describe_environment(**facts))


def _require_same_data(folder, data):
    import json

    from keras_emr.errors import UserError

    before = json.loads(folder.environment.read_text())["data_sha256"]
    if before != data.fingerprint:
        raise UserError(
            f"data: a resumed search needs the data it began with. Received: {data.name!r} with "
            f"SHA-256 {data.fingerprint[:12]}, the search has {before[:12]}. Search anew in another"
            " --out."
        )
