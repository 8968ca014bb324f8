"""Maximizers on disk: what a run keeps, and how it is taken up again."""

from __future__ import annotations

from pathlib import Path

import keras

from keras_emr.errors import UserError

FILE_NAME = "maximizer.keras"


def load_maximizer(path):
    """The maximizer of a run folder (that of its best epoch) or of a ``.keras`` file.

    Raises:
        UserError: there is none, or the file is something else.
    """
    from keras_emr.maximizers import Generator, LearnedMaximizer

    given = str(path)
    path = Path(path)
    if path.is_dir():
        path = path / FILE_NAME
    if not path.exists():
        raise UserError(
            f"maximizer not found. Received: {given!r}. Expected a run that trained one (--attack "
            f"lstm, rnn, ...), or its {FILE_NAME}."
        )
    try:
        found = keras.saving.load_model(path, compile=False)
    except Exception as error:  # a damaged archive can fail in any way
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"cannot load the maximizer: {reason} Received: {given!r}.") from None
    if not isinstance(found, (LearnedMaximizer, Generator)):
        raise UserError(
            f"not a maximizer. Received: {given!r}, which holds a {type(found).__name__}. Expected "
            f"a run that trained one, or its {FILE_NAME}."
        )
    return found


def foreign(maximizer, epsilon, channels):
    """What ``maximizer`` was not trained for, a line each: it can be used, with less success.

    Raises:
        UserError: a generator for images with another number of channels.
    """
    before = maximizer.trained_for
    if not before:
        return []
    lines = []
    if abs(before["epsilon"] - epsilon) > 1e-9:
        lines.append(
            f"the maximizer was trained for epsilon {before['epsilon']:g}, not {epsilon:g}"
        )
    if before["channels"] != channels:
        text = f"the maximizer was trained for {before['channels']} channels, not {channels}"
        if maximizer.describe()["cell"] == "generator":
            raise UserError(f"{text}. Received: a generator, whose weights depend on them.")
        lines.append(text)
    return lines
