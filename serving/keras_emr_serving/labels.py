"""The labels that clients ask for, and those that remember the version before."""

from __future__ import annotations

import re

from keras_emr.errors import UserError

STABLE, PREVIOUS = "stable", "previous"
_LABEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


def require_label(label: str) -> None:
    """Refuse what cannot be a label to promote to. Raises :class:`UserError`."""
    if not _LABEL.fullmatch(label):
        raise UserError(
            f"--label: not a label. Received: {label!r}. Expected letters, digits, '.', '_', '-'."
        )
    if label == PREVIOUS or label.endswith(f"-{PREVIOUS}"):
        raise UserError(
            f"--label: it is kept for the version before. Received: {label!r}. Choose another."
        )


def previous_of(label: str) -> str:
    """The label of the version that had ``label`` before."""
    return PREVIOUS if label == STABLE else f"{label}-{PREVIOUS}"
