"""When a trial is hopeless: the median stopping rule."""

from __future__ import annotations

from pathlib import Path

import keras
import numpy as np

from keras_emr.training.run_folder import RunFolder


class MedianRule:
    """Stop a trial whose best value so far is below what others had on average by then.

    At the end of epoch ``t``: if the best objective so far is strictly less than the median, over
    the other trials that reached epoch ``t``, of the mean of their objectives up to ``t``.

    Args:
        folder: of all trials; every one has ``history.jsonl``.
        after: epochs that every trial gets.
        others: trials that must have reached epoch ``t``.

    Source: Golovin et al., "Google Vizier", KDD 2017, section 3.2.1.
    """

    def __init__(self, folder, after=1, others=3):
        self.folder, self.after, self.others = Path(folder), after, others

    def hopeless(self, name, values, objective):
        """Whether trial ``name`` with the objectives ``values``, one an epoch, is."""
        t = len(values)
        if t < self.after:
            return False
        means = []
        for ended in sorted(self.folder.glob("*/result.json")):
            if ended.parent.name != name:
                seen = [_finite(row[objective]) for row in _rows(ended.parent)[:t]]
                if len(seen) == t:
                    means.append(np.mean(seen))
        return len(means) >= self.others and max(values) < np.median(means)


class StopHopeless(keras.callbacks.Callback):
    """Ends training when ``rule`` says so; ``stopped`` tells.

    It reads ``history.jsonl``, a taken-up run's earlier epochs included: put it after the recorder.

    Args:
        rule: :class:`MedianRule`.
        name: of the trial.
        objective: key of the history.
    """

    def __init__(self, rule, name, objective):
        super().__init__()
        self.rule, self.name, self.objective = rule, name, objective
        self.stopped = False

    def check(self):
        """Apply the rule to the history on disk: after how many epochs to stop, or 0 to go on."""
        rows = _rows(self.rule.folder / self.name)
        values = [_finite(row[self.objective]) for row in rows]
        self.stopped = bool(values) and self.rule.hopeless(self.name, values, self.objective)
        return len(values) if self.stopped else 0

    def on_epoch_end(self, epoch, logs=None):
        if self.check():
            self.model.stop_training = True


def _rows(path):
    return RunFolder(path).read_history()


def _finite(value):
    return -np.inf if value is None else value
