"""The chief and its workers over gRPC, in one process: leases, names, answers that do not come."""

import time

import pytest

from keras_emr.tuning import chief as chief_module
from keras_emr.tuning import worker as worker_module
from keras_emr.tuning.chief import Chief
from keras_emr.tuning.kerastuner import KerasTunerStudy
from keras_emr.tuning.space import Choice, Range
from keras_emr.tuning.trials import Result
from keras_emr.tuning.worker import ChiefLost, RemoteStudy

SPACE = [
    Choice("defense", ("at", "trades")),
    Range("beta", 1, 10, when={"defense": ("trades",)}),
    Range("learning_rate", 1e-4, 1e-2, sampling="log"),
]


@pytest.fixture
def chief(tmp_path):
    study = KerasTunerStudy("random", SPACE, "val_accuracy", tmp_path / "s.json", max_trials=2)
    chief = Chief(study, "127.0.0.1", 0, "mine")
    yield chief
    chief.stop()


def join(chief, name, search="mine", **options):
    return RemoteStudy(
        f"127.0.0.1:{chief.port}", name, search, options.pop("lost", print), **options
    )


def result(trial, score=0.5):
    return Result(trial.name, "completed", trial.values, score=score, epoch=3)


def test_a_search_over_the_wire_is_the_search(chief, tmp_path, capsys):
    here = KerasTunerStudy("random", SPACE, "val_accuracy", tmp_path / "h.json", max_trials=2)
    study, ended = join(chief, "a"), []
    chief.on_end = ended.append
    while (trial := study.ask()) is not None:
        assert trial == here.ask()
        study.tell(trial, result(trial))
        study.tell(trial, result(trial, 0.9))  # as after an answer that was lost
        here.tell(trial, result(trial))
    assert here.ask() is None and chief.over and not chief.study.waiting
    assert chief.study.ended() == ended == ["0000", "0001"]
    best = chief.study.oracle.get_best_trials(1)[0]
    assert (best.score, best.best_step) == (0.5, 3)
    study.close()
    assert capsys.readouterr().out == ""  # KerasTuner prints conditions that it sends


def test_a_silent_worker_loses_its_trial_and_is_told(chief, monkeypatch):
    monkeypatch.setattr(chief_module, "LEASE", 0.5)
    monkeypatch.setattr(worker_module, "BEAT", 60)  # silent
    lost, other = join(chief, "a"), join(chief, "b")
    trial = lost.ask()
    assert chief.lapsed() == {}
    time.sleep(0.6)
    assert chief.lapsed() == {"a": "0000", "b": None}
    assert other.ask() == trial
    with pytest.raises(ChiefLost, match="the trial was given to b"):
        lost.tell(trial, result(trial))
    other.tell(trial, result(trial))
    for study in (lost, other):
        study.close()


def test_signs_of_life_keep_a_lease(chief, monkeypatch):
    monkeypatch.setattr(chief_module, "LEASE", 1.0)
    monkeypatch.setattr(worker_module, "BEAT", 0.1)
    study = join(chief, "a")
    study.ask()
    time.sleep(1.3)
    assert chief.lapsed() == {} and chief.alive() == {"a"}
    study.close()


def test_a_worker_waits_while_another_may_leave_its_trial_behind(chief):
    first, second = join(chief, "a"), join(chief, "b")
    mine, theirs = first.ask(), second.ask()
    first.tell(mine, result(mine))
    chief.gone("b")
    assert first.ask() == theirs
    first.tell(theirs, result(theirs))
    assert first.ask() is None
    for study in (first, second):
        study.close()


def test_a_name_is_one_workers_and_a_search_one_folders(chief):
    study = join(chief, "a")
    with pytest.raises(ChiefLost, match="a worker called a is at work already"):
        join(chief, "a")
    with pytest.raises(ChiefLost, match="the chief there runs another search"):
        join(chief, "b", search="other")
    chief.gone("a")  # it died; started again it may have its name
    join(chief, "a").close()
    study.close()


def test_a_chief_that_is_gone_is_noticed(chief, monkeypatch):
    monkeypatch.setattr(worker_module, "BEAT", 0.05)
    told = []
    study = join(chief, "a", lost=told.append, patience=0.5)
    chief.stop()
    until = time.monotonic() + 20
    while not told and time.monotonic() < until:
        time.sleep(0.05)
    assert told == [f"no answer from the chief at 127.0.0.1:{chief.port} for 0.5 s"]
    with pytest.raises(ChiefLost):
        study.ask()
    study.close()
    with pytest.raises(ChiefLost, match=r"no answer .* for 0\.3 s"):
        join(chief, "b", patience=0.3)
