"""Times that can be compared on a busy machine: the candidates take turns."""

from __future__ import annotations

import time

import numpy as np


def in_turns(jobs, rounds, warm_up=1, progress=None):
    """Results of ``jobs``, called one after the other, ``rounds`` times over.

    Args:
        jobs: functions without arguments that return a time or an array of times.
        rounds: rounds that count, >= 1.
        warm_up: rounds before them that do not: compilation, caches.
        progress: called with the number of rounds done so far and their total.

    Returns:
        One array (rounds, ...) per job.
    """
    taken = [[] for _ in jobs]
    for i in range(warm_up + rounds):
        for job, times in zip(jobs, taken, strict=True):
            result = job()
            if i >= warm_up:
                times.append(result)
        if progress:
            progress(i + 1, warm_up + rounds)
    return [np.array(times) for times in taken]


def training_seconds(classifiers, x, y, rounds, warm_up=3, progress=None):
    """Seconds of single training steps, the classifiers taking turns: (rounds, classifiers).

    Args:
        classifiers: compiled Keras models. They are trained by it.
        x, y: one batch.
        rounds, warm_up, progress: see :func:`in_turns`.
    """

    def job(classifier):
        def step():
            began = time.perf_counter()
            classifier.train_on_batch(x, y)
            return time.perf_counter() - began

        return step

    return np.stack(in_turns([job(c) for c in classifiers], rounds, warm_up, progress), axis=1)


def ratios(first, second, x, y, rounds, warm_up=3):
    """``(second / first of each round, seconds (rounds, 2))`` of :func:`training_seconds`."""
    seconds = training_seconds((first, second), x, y, rounds, warm_up)
    return seconds[:, 1] / seconds[:, 0], seconds


def quartiles(values):
    """``{"median": ..., "low": ..., "high": ...}``: the median and the two quartiles."""
    low, middle, high = np.percentile(values, (25, 50, 75))
    return {"median": float(middle), "low": float(low), "high": float(high)}
