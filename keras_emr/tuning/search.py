"""The loop of one worker: ask, run, tell."""

from __future__ import annotations

FAILURES = 3  # in a row end a search


class SearchFailed(RuntimeError):
    """Trial after trial failed; the message has the first one's cause."""


def search(study, run, on_end=None, failures=FAILURES):
    """Run trials until ``study`` has no more.

    Args:
        study: :class:`keras_emr.tuning.trials.Study`.
        run: :class:`keras_emr.tuning.trials.TrialRunner`.
        on_end: called with every result.
        failures: so many trials in a row that fail end the search.

    Raises:
        SearchFailed: they did.
    """
    failed = []
    while (trial := study.ask()) is not None:
        result = run(trial)
        study.tell(trial, result)
        if on_end:
            on_end(result)
        failed = [] if result.ok else [*failed, result]
        require_success(failed, failures)


def require_success(failed, failures=FAILURES):
    """Raise :class:`SearchFailed` if ``failed``, the latest results in a row, are too many."""
    if len(failed) >= failures:
        first = failed[0]
        raise SearchFailed(
            f"{len(failed)} trials in a row failed. The first, {first.trial}: {first.message}"
        )
