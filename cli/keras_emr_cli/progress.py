"""Progress on stderr: a live bar on a terminal; a line per epoch or attack everywhere."""

from __future__ import annotations

import sys
import time

import keras
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

# Seconds between two lines about the same work where there is no bar.
_EVERY = 60.0


def warn(text):
    """One line on stderr."""
    print(f"Warning: {text}", file=sys.stderr, flush=True)


def warn_of_chance(title, history, classes):
    """Say so if a run of this history is no better than guessing: one in ``classes``."""
    best = max(row["val_accuracy"] for row in history)
    if best <= 1.2 / classes:
        warn(
            f"{title} has learned nothing: its validation accuracy never rose above {best:.1%}. "
            "Train for more epochs or at another learning rate, or with less AWP, augmentation or "
            "EMR."
        )


class Reporter:
    """One bar at a time on stderr; nothing at all with ``quiet``."""

    def __init__(self, quiet=False):
        self.quiet = quiet
        self.console = Console(stderr=True, highlight=False, soft_wrap=True)
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=self.console,
            transient=True,
            disable=quiet or not self.console.is_terminal,
        )

    def __enter__(self):
        self.bar.start()
        return self

    def __exit__(self, *error):
        self.bar.stop()

    def say(self, text):
        if not self.quiet:
            self.console.print(text)

    def steps(self, title):
        """A callable ``(done, total)`` that moves a bar called ``title``."""
        task = self.bar.add_task(title, total=None)

        def update(done, total):
            self.bar.update(task, completed=done, total=total)
            if done >= total:
                self.bar.update(task, visible=False)

        return update

    def by_title(self):
        """A callable ``(title, done, total)`` that moves a bar per title.

        Elsewhere than on a terminal: a line a minute with the time left, and one at the end of
        each title.
        """
        bars, lines = {}, {}

        def update(title, done, total):
            if title not in bars:
                bars[title] = self.steps(title)
                lines[title] = _Lines(title)
            bars[title](done, total)
            if self.bar.disable and (line := lines[title].tell(done, total)):
                self.say(line)

        return update


class _Lines:
    """What a log shows of one piece of work."""

    def __init__(self, title):
        self.title = title
        self.began = self.told = time.monotonic()
        self.ended = False

    def tell(self, done, total):
        """A line, or ``None`` where there is nothing new to say."""
        now = time.monotonic()
        if self.ended or (done < total and now - self.told < _EVERY):
            return None
        self.told, spent = now, now - self.began
        if done >= total:
            self.ended = True
            return f"{self.title}  done in {_duration(spent)}"
        left = f", about {_duration(spent * (total - done) / done)} left" if done else ""
        return f"{self.title}  {100 * done / total:.0f} %{left}"


def _duration(seconds):
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {seconds} s" if minutes else f"{seconds} s"


class EpochReport(keras.callbacks.Callback):
    """A bar over the run's steps and a line per epoch.

    Args:
        reporter: :class:`Reporter`.
        title: of the run.
        epochs: epochs in all.
        steps: per epoch.
    """

    def __init__(self, reporter, title, epochs, steps):
        super().__init__()
        self.reporter, self.title, self.epochs, self.steps = reporter, title, epochs, steps
        self._update = reporter.steps(title)
        self._done = 0

    def on_epoch_begin(self, epoch, logs=None):
        self._done = epoch * self.steps

    def on_train_batch_end(self, batch, logs=None):
        self._update(self._done + batch + 1, self.epochs * self.steps)

    def on_epoch_end(self, epoch, logs=None):
        shown = ("loss", "inner_loss", "accuracy", "robust_accuracy", "val_accuracy")
        shown += ("val_robust_accuracy",)
        figures = "  ".join(f"{key} {logs[key]:.4f}" for key in shown if key in logs)
        self.reporter.say(f"{self.title}  epoch {epoch + 1}/{self.epochs}  {figures}")
