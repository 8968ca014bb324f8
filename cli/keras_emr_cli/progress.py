"""What a run says on stderr: warnings, and a line per epoch."""

from __future__ import annotations

import sys

import keras


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
