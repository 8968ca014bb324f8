"""Progress on stderr: a live bar on a terminal, a line per epoch everywhere."""

from __future__ import annotations

import sys

import keras
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


def warn(text):
    """One line on stderr."""
    print(f"Warning: {text}", file=sys.stderr, flush=True)


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
        """A callable ``(title, done, total)`` that moves a bar per title."""
        bars = {}

        def update(title, done, total):
            if title not in bars:
                bars[title] = self.steps(title)
            bars[title](done, total)

        return update


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
