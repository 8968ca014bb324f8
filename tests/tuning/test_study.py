"""KerasTuner's oracles as a study: whenever it is killed, it goes on as if it had not been."""

import random

import pytest

from keras_emr.tuning.kerastuner import KerasTunerStudy
from keras_emr.tuning.space import Choice, Range
from keras_emr.tuning.trials import Result

SPACE = [
    Choice("defense", ("at", "trades")),
    Range("learning_rate", 1e-4, 1e-2, sampling="log"),
    Range("beta", 1, 10, when={"defense": ("trades",)}),
    Range("steps", 2, 5, whole=True),
]


def open_study(path, search, max_trials=12):
    space = SPACE[:2] if search == "bayesian" else SPACE  # 6 random trials, then its model's
    limits = {"max_epochs": 9} if search == "hyperband" else {"max_trials": max_trials}
    return KerasTunerStudy(search, space, "val_robust_accuracy", path, **limits)


def score(trial):
    bonus = 0.1 * (trial.values["defense"] == "at") + 0.01 * (trial.epochs or 0)
    return 0.5 + bonus - 10 * abs(trial.values["learning_rate"] - 0.003)


def result(trial, score, status="completed"):
    return Result(trial.name, status, trial.values, score=score, epoch=1)


def whole_search(path, search, dies=lambda: False):
    """``[(trial, score)]``; the process dies, again and again, when ``dies()``."""
    study, told = open_study(path, search), []
    while (trial := study.ask()) is not None:
        if dies():  # in the trial: nothing was told
            study = open_study(path, search)
            continue
        told.append((trial, score(trial)))
        study.tell(trial, result(trial, score(trial)))
        if dies():  # just after it
            study = open_study(path, search)
    return told


@pytest.mark.parametrize("search", ["random", "hyperband", "bayesian"])
def test_killed_searches_give_the_same_trials(tmp_path, search):
    whole = whole_search(tmp_path / "whole.json", search)
    coin = random.Random(0)
    parts = whole_search(tmp_path / "parts.json", search, lambda: coin.random() < 0.4)
    assert parts == whole
    names = [trial.name for trial, _ in whole]
    assert names == [f"{i:04d}" for i in range(len(whole))]
    # Hyperband of 9 epochs and factor 3 has brackets of 9 + 3 + 1, 5 + 2 and 3 trials.
    assert len(whole) == (23 if search == "hyperband" else 12)


def test_values_are_in_the_space_and_conditions_hold(tmp_path):
    told = whole_search(tmp_path / "s.json", "random")
    for trial, _ in told:
        values = trial.values
        assert 1e-4 <= values["learning_rate"] <= 1e-2 and values["steps"] in (2, 3, 4, 5)
        assert ("beta" in values) == (values["defense"] == "trades")
        assert float(f"{values['learning_rate']:.6g}") == values["learning_rate"]
    assert len({v["defense"] for v in (trial.values for trial, _ in told)}) == 2


def test_hyperband_goes_on_from_the_run_of_the_same_values(tmp_path):
    told = {trial.name: (trial, s) for trial, s in whole_search(tmp_path / "s.json", "hyperband")}
    further = [trial for trial, _ in told.values() if trial.continues]
    assert len(further) == 3 + 1 + 2
    for trial in further:
        before = told[trial.continues][0]
        assert trial.values == before.values and trial.epochs == 3 * before.epochs
    first = [s for trial, s in told.values() if trial.epochs == 1]
    assert told[further[0].continues][1] in sorted(first)[-3:]


def test_a_worker_that_is_gone_leaves_its_trial_to_the_next(tmp_path):
    study = open_study(tmp_path / "s.json", "random", max_trials=2)
    mine, other = study.ask("a"), study.ask("b")
    assert (mine.name, other.name) == ("0000", "0001")
    assert study.ask("a") == mine  # asked again: the same one
    assert study.owner(0) == "a"
    assert study.release("a") == "0000" and study.release("a") is None
    assert study.ask("b") == other
    study.tell(other, result(other, 0.5))
    assert study.ask("b") == mine
    study.tell(mine, result(mine, 0.5))
    study.tell(mine, result(mine, 0.9))  # told twice counts once
    assert study.ask("b") is None and not study.waiting
    assert study.ended() == ["0001", "0000"]
    assert [t.score for t in study.oracle.get_best_trials(2)] == [0.5, 0.5]


def test_failed_trials_can_be_tried_again(tmp_path):
    study = open_study(tmp_path / "s.json", "random", max_trials=3)
    for failed in (True, False, True):
        trial = study.ask()
        study.tell(trial, result(trial, None, "failed") if failed else result(trial, 0.5))
    assert study.ask() is None
    study = open_study(tmp_path / "s.json", "random", max_trials=3)
    study.retry_failed()
    again = study.ask()
    assert again.name == "0000"
    study.tell(again, result(again, 0.7))
    assert study.ask().name == "0002"
