"""Progress on stderr: a live bar on a terminal; lines elsewhere."""

from __future__ import annotations

import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

# Seconds between two lines about the same work where there is no bar.
_EVERY = 60.0


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
