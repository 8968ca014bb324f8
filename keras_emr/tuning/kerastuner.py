"""KerasTuner's oracles as a study whose state survives being killed at any moment.

KerasTuner proposes; running and supervising trials is ours. Its own state is spread over a file
per trial and one of the oracle, each written in place: a process killed between two of them loses
a trial or repeats one that has ended. Here an oracle's whole state is one file, replaced at once.
"""

from __future__ import annotations

import contextlib
import json
import threading
from pathlib import Path

import numpy as np

from keras_emr.training.run_folder import RunFolder
from keras_emr.tuning.space import Choice
from keras_emr.tuning.trials import Trial

_NEVER = 10**9


class KerasTunerStudy:
    """Trials from one of KerasTuner's oracles (see :class:`keras_emr.tuning.trials.Study`).

    A trial that was handed out and not told is handed out again, with the same name and values:
    to its worker when it asks again, to the next one that asks after :meth:`release`, and to
    whoever asks first after the study was opened anew. Safe for threads.

    Args:
        search: one of :data:`keras_emr.tuning.SEARCHES`.
        space: list of :class:`Choice` and :class:`Range`; parents before those that depend on
            them.
        objective: what is maximised.
        path: file of the state; if it exists the search goes on.
        seed: int >= 0. The proposals are a function of it and of what was told, in its order.
        max_trials: bound of the number of trials; ``None`` for all that Hyperband has.
        max_epochs, factor, iterations: of Hyperband.
    """

    def __init__(
        self,
        search,
        space,
        objective,
        path,
        *,
        seed=0,
        max_trials=None,
        max_epochs=None,
        factor=3,
        iterations=1,
    ):
        self.path = Path(path)
        options = {
            "objective": _objective(objective),
            "hyperparameters": hyperparameters(space),
            "seed": seed + 1,  # KerasTuner takes 0 for none
            "max_consecutive_failed_trials": _NEVER,  # that is the search's to judge
        }
        if search == "hyperband":
            options |= {"max_epochs": max_epochs, "factor": factor}
            options["hyperband_iterations"] = iterations
        self.oracle = _oracle_class(search)(**options)
        self.oracle.max_trials = max_trials
        self.oracle.verbose = 0
        self.oracle.file = self.path
        self.lock = threading.RLock()
        if self.path.exists():
            self.oracle.reload()

    def ask(self, worker="worker-0"):
        """The next trial; ``None``: the search is over, or waits for what other workers run."""
        with self.lock:
            proposed = self.oracle.create_trial(worker)
        return as_trial(proposed) if proposed.status == "RUNNING" else None

    def tell(self, trial, result):
        """The trial has ended."""
        self.end(int(trial.name), result.score if result.ok else None, result.epoch)

    def end(self, number, score, step=None):
        """Trial ``number`` has ended with ``score``, ``None``: failed. Twice is as good as once."""
        with self.lock:
            found = self._find(number)
            if found.status != "RUNNING":
                return
            if score is not None:
                # As its chief's messages have it, so that both ways propose the same trials.
                metrics = {self.oracle.objective.name: float(np.float32(score))}
                self.oracle.update_trial(found.trial_id, metrics, step=step or 0)
            if found.trial_id in self.oracle._retry_queue:  # given up, not run
                self.oracle._retry_queue.remove(found.trial_id)
            found.status = "FAILED" if score is None else "COMPLETED"
            self.oracle.end_trial(found)
            self.oracle.save()

    def release(self, worker):
        """Hand what ``worker`` runs to the next that asks; its name, or ``None`` for nothing."""
        with self.lock:
            trial = self.oracle.ongoing_trials.pop(worker, None)
            self.oracle.tuner_ids.discard(worker)
            if trial is None:
                return None
            self.oracle._retry_queue.append(trial.trial_id)
            self.oracle.save()
            return as_trial(trial).name

    def values(self, name):
        """Of the trial called ``name``."""
        with self.lock:
            return as_trial(self._find(int(name))).values

    def owner(self, number):
        """Who runs trial ``number``, or ``None``."""
        with self.lock:
            for worker, trial in self.oracle.ongoing_trials.items():
                if int(trial.trial_id) == number:
                    return worker
        return None

    @property
    def waiting(self):
        """Whether trials are under way, or were given back."""
        with self.lock:
            return bool(self.oracle.ongoing_trials or self.oracle._retry_queue)

    def ended(self):
        """Names of the trials that have ended, in that order."""
        with self.lock:
            return [as_trial(self.oracle.trials[i]).name for i in self.oracle.end_order]

    def retry_failed(self):
        """Hand out the failed trials once more."""
        with self.lock:
            failed = [i for i, t in self.oracle.trials.items() if t.status == "FAILED"]
            for trial_id in failed:
                self.oracle.trials[trial_id].status = "RUNNING"
                self.oracle.end_order.remove(trial_id)
            self.oracle._retry_queue[:0] = reversed(failed)
            self.oracle.save()

    def _find(self, number):
        return next(t for i, t in self.oracle.trials.items() if int(i) == number)


def as_trial(proposed):
    """KerasTuner's trial as ours; what Hyperband decides is no value of the space."""
    values = proposed.hyperparameters.values
    earlier = values.get("tuner/trial_id")
    return Trial(
        name=f"{int(proposed.trial_id):04d}",
        values={name: _plain(values[name]) for name in sorted(values) if "/" not in name},
        epochs=values.get("tuner/epochs"),
        continues=None if earlier is None else f"{int(earlier):04d}",
    )


def _plain(value):
    # Six digits: what a table shows is what was run, and what repeats it.
    return float(f"{value:.6g}") if isinstance(value, float) else value


def hyperparameters(space):
    """The space as ``keras_tuner.HyperParameters``."""
    import keras_tuner

    found = keras_tuner.HyperParameters()
    for parameter in space:
        with contextlib.ExitStack() as scopes:
            for parent, values in parameter.when.items():
                scopes.enter_context(found.conditional_scope(parent, list(values)))
            if isinstance(parameter, Choice):
                found.Choice(parameter.name, list(parameter.values))
                continue
            kind = found.Int if parameter.whole else found.Float
            bounds = parameter.low, parameter.high
            kind(parameter.name, *bounds, step=parameter.step, sampling=parameter.sampling)
    return found


def _objective(name):
    import keras_tuner

    return keras_tuner.Objective(name, "max")


def _oracle_class(search):
    from keras_tuner import oracles

    class Durable:
        """Keeps the whole state in one file, ``file``; goes before a class of oracles."""

        def save(self):
            trials = {i: trial.get_state() for i, trial in self.trials.items()}
            state = {**self.get_state(), "trials": trials}
            RunFolder.write_text(self.file, json.dumps(state))

        def _save_trial(self, trial):
            pass

        def reload(self):
            from keras_tuner.engine.trial import Trial as TheirTrial

            state = json.loads(self.file.read_text())
            trials = state.pop("trials")
            self.trials = {i: TheirTrial.from_state(trial) for i, trial in trials.items()}
            self.set_state(state)
            self.ongoing_trials = {}
            # KerasTuner would run a trial again that was killed just after it ended.
            begun = [i for i in self.start_order if self.trials[i].status == "RUNNING"]
            self._retry_queue = begun[::-1]  # it takes from the end

        def populate_space(self, trial_id):
            if hasattr(self, "_random_state"):  # not in its state: a function of what is
                self._random_state = np.random.RandomState([self.seed, int(trial_id)])
            return super().populate_space(trial_id)

    theirs = {
        "random": oracles.RandomSearchOracle,
        "bayesian": oracles.BayesianOptimizationOracle,
        "hyperband": oracles.HyperbandOracle,
    }[search]
    return type(f"Durable{theirs.__name__}", (Durable, theirs), {})
