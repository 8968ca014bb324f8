"""Running, stopping, keeping and ranking trials; no tuner and no training needed."""

import contextlib
import json
import shutil
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest

from keras_emr.errors import UserError
from keras_emr.tuning import trials as trials_module
from keras_emr.tuning.finalists import finalists, pareto, ranked
from keras_emr.tuning.search import SearchFailed, search
from keras_emr.tuning.stopping import MedianRule, StopHopeless
from keras_emr.tuning.trials import Result, Trial, TrialRunner, locked, read_result


@pytest.fixture(autouse=True)
def no_clearing(monkeypatch):
    """Other tests' models live in this process, too."""
    monkeypatch.setattr(trials_module, "memory_released", contextlib.nullcontext)


def rows(*robust, clean=0.9):
    return [
        {
            "epoch": i + 1,
            "robust_accuracy": 0.5,
            "val_accuracy": clean,
            "val_robust_accuracy": value,
            "seconds": 2.0,
        }
        for i, value in enumerate(robust)
    ]


def write_run(path, *robust, ended=True):
    path.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row) + "\n" for row in rows(*robust))
    (path / "history.jsonl").write_text(text)
    if ended:
        (path / "result.json").write_text("{}")


class Training:
    """In place of training: writes these robust accuracies, or raises."""

    def __init__(self, *robust, error=None):
        self.robust, self.error, self.calls = robust, error, []

    def __call__(self, trial, path, callbacks):
        self.calls.append((trial, sorted(p.name for p in path.iterdir())))
        if self.error:
            raise self.error
        write_run(path, *self.robust[: trial.epochs], ended=False)
        return SimpleNamespace(history=rows(*self.robust[: trial.epochs]))


def runner(folder, training, **options):
    return TrialRunner(folder / "trials", training, errors=folder / "errors", **options)


def test_a_result_is_of_the_best_epoch_and_kept(tmp_path):
    training = Training(0.2, 0.6, 0.4)
    run = runner(tmp_path, training)
    trial = Trial("0000", {"beta": 2.0})
    result = run(trial)
    assert result == Result(
        "0000", "completed", {"beta": 2.0}, score=0.6, clean=0.9, robust=0.6, epoch=2, epochs=3,
        seconds=6.0,
    )  # fmt: skip
    assert run(trial) == result == read_result(tmp_path / "trials" / "0000")
    assert len(training.calls) == 1  # ended before it was told: not trained again


@pytest.mark.parametrize(
    ("error", "message", "traces"),
    [
        (ZeroDivisionError("a\nb"), "ZeroDivisionError: a b", ["0000.txt"]),
        (UserError("beta: bad. Received: 1."), "beta: bad. Received: 1.", []),
    ],
    ids=["bug", "user"],
)
def test_a_trial_that_fails_says_why_and_is_run_again_when_asked(tmp_path, error, message, traces):
    training = Training(0.5, error=error)
    result = runner(tmp_path, training)(Trial("0000", {}))
    assert (result.status, result.message, result.score) == ("failed", message, None)
    assert [path.name for path in tmp_path.glob("errors/*")] == traces
    for path in tmp_path.glob("errors/*"):
        assert "Traceback" in path.read_text()
    training.error = None
    assert runner(tmp_path, training)(Trial("0000", {})).score == 0.5


def test_divergence_counts_by_what_was_reached(tmp_path):
    from keras_emr.training.callbacks import TrainingDiverged

    training = Training(error=TrainingDiverged("loss became nan at step 3 of epoch 1."))
    result = runner(tmp_path, training)(Trial("0000", {}))
    assert (result.status, result.score, result.epoch) == ("diverged", 0.0, None)
    write_run(tmp_path / "trials" / "0001", 0.3, 0.2, ended=False)
    result = runner(tmp_path, training)(Trial("0001", {}))
    assert (result.status, result.score, result.epoch) == ("diverged", 0.3, 1)


def test_a_later_round_goes_on_from_a_copy_of_the_run(tmp_path):
    before = tmp_path / "trials" / "0000"
    write_run(before, 0.3)
    for name in ("checkpoints/state", "config.yaml", "tensorboard/events", "final.json"):
        (before / name).parent.mkdir(exist_ok=True)
        (before / name).write_text(name)
    training = Training(0.3, 0.4, 0.5)
    trial = Trial("0007", {}, epochs=3, continues="0000")
    # Killed while it was copied.
    (tmp_path / "trials" / ".0007.part").mkdir()
    result = runner(tmp_path, training)(trial)
    taken = ["checkpoints", "config.yaml", "history.jsonl"]
    assert training.calls == [(trial, [".lock", *taken])]
    assert (result.score, result.continues) == (0.5, "0000")
    assert (before / "result.json").read_text() == "{}"
    assert not list((tmp_path / "trials").glob(".*"))


HOLD = """
import sys
from keras_emr.tuning.trials import locked
with locked(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_two_processes_never_train_in_one_folder(tmp_path):
    other = subprocess.Popen(
        [sys.executable, "-c", HOLD, tmp_path], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        assert other.stdout.readline() == b"held\n"
        with pytest.raises(UserError, match="another process works in this folder"):
            with locked(tmp_path, seconds=0.1):
                pass
    finally:
        other.kill()  # no clean-up of its own
        other.communicate()
    with locked(tmp_path, seconds=5):
        pass


def test_median_rule(tmp_path):
    """Means of the first two epochs: 0.25, 0.35, 0.5; their median is 0.35."""
    for i, values in enumerate([(0.2, 0.3, 0.9), (0.3, 0.4), (0.5, 0.5, 0.1), (0.1,)]):
        write_run(tmp_path / f"{i:04d}", *values)
    write_run(tmp_path / "0008", 0.9, 0.9, ended=False)  # under way: does not count
    rule = MedianRule(tmp_path, after=2)
    key = "val_robust_accuracy"
    assert not rule.hopeless("0009", [0.35, 0.1], key)  # its best is the median
    assert rule.hopeless("0009", [0.34, 0.1], key)
    assert not rule.hopeless("0009", [0.0], key)  # too early
    assert not rule.hopeless("0009", [0.0] * 3, key)  # only two others came so far
    write_run(tmp_path / "0009", 0.1, 0.34, ended=False)
    callback = StopHopeless(rule, "0009", key)
    callback.set_model(SimpleNamespace(stop_training=False))
    callback.on_epoch_end(1)
    assert callback.stopped and callback.model.stop_training


def test_a_trial_killed_when_it_was_to_stop_stops(tmp_path):
    for i in range(3):
        write_run(tmp_path / "trials" / f"{i:04d}", 0.5, 0.5, 0.5)
    write_run(tmp_path / "trials" / "0003", 0.1, 0.2, ended=False)
    rule = MedianRule(tmp_path / "trials", after=2)
    result = runner(tmp_path, Training(0.1, 0.2, 0.9), rule=rule)(Trial("0003", {}))
    assert (result.status, result.epochs, result.score) == ("stopped", 2, 0.2)


def made(name, score, clean=0.9, **more):
    about = {"score": score, "clean": clean, "robust": score, "epoch": 1, "epochs": 1, **more}
    return Result(name, about.pop("status", "completed"), {}, **about)


def test_the_order_is_that_of_the_strong_scores_then_of_the_cheap(tmp_path):
    results = [
        made("0000", 0.5),
        made("0001", 0.7),
        made("0002", 0.6),
        made("0003", 0.65, continues="0001"),  # the same run, further on
        made("0004", None, status="failed", epoch=None),
        made("0005", 0.0, status="diverged", epoch=None),
        made("0006", 0.5),
    ]
    assert [r.trial for r in finalists(results, 2)] == ["0003", "0002"]
    order = [r.trial for r in ranked(results, {"0003": 0.4, "0002": 0.45})]
    assert order == ["0002", "0003", "0000", "0006"]
    assert finalists(results, 0) == []


def test_pareto():
    points = {"a": (0.9, 0.5), "b": (0.8, 0.6), "c": (0.8, 0.5), "d": (0.9, 0.5), "e": (0.95, 0.1)}
    assert pareto(points) == ["a", "b", "d", "e"]


class Asked:
    """A study of three trials; what an adapter of another tuner has to have."""

    def __init__(self, n):
        self.left, self.told = [Trial(f"{i:04d}", {}) for i in range(n)], []

    def ask(self):
        return self.left.pop(0) if self.left else None

    def tell(self, trial, result):
        self.told.append((trial.name, result.score))


def test_search_asks_runs_and_tells():
    study, ended = Asked(3), []
    search(study, lambda trial: made(trial.name, int(trial.name) / 10), ended.append)
    assert study.told == [("0000", 0.0), ("0001", 0.1), ("0002", 0.2)]
    assert [result.trial for result in ended] == ["0000", "0001", "0002"]


def test_three_failures_in_a_row_end_a_search_with_the_first_ones_cause():
    bad = [Result(f"{i:04d}", "failed", {}, message=f"cause {i}") for i in range(9)]
    outcomes = iter([bad[0], bad[1], made("0002", 0.1), *bad[3:]])
    study = Asked(9)
    with pytest.raises(SearchFailed, match=r"3 trials in a row failed\. The first, 0003: cause 3"):
        search(study, lambda trial: replace(next(outcomes), trial=trial.name))
    assert len(study.told) == 6


def test_no_copy_is_left_where_a_run_was_taken_up_before(tmp_path):
    """The second attempt at a trial trains on in its own folder."""
    before = tmp_path / "trials" / "0000"
    write_run(before, 0.3)
    (before / "config.yaml").write_text("old")
    own = tmp_path / "trials" / "0001"
    shutil.copytree(before, own)
    (own / "result.json").unlink()
    (own / "config.yaml").write_text("mine")
    training = Training(0.3, 0.4)
    runner(tmp_path, training)(Trial("0001", {}, epochs=2, continues="0000"))
    assert (own / "config.yaml").read_text() == "mine"
