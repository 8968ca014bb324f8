"""Version labels: which may be given to which versions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from keras_emr_serving.server.config import ModelConfig
from keras_emr_serving.server.status import ServingError

Labels = dict[str, dict[str, int]]


def assign(
    models: Iterable[ModelConfig],
    states: Mapping[str, Mapping[int, str]],
    held: Labels,
    early: bool = False,
) -> Labels:
    """The labels that ``models`` ask for: model -> label -> version.

    Args:
        states: model -> version -> state, as they are before anything of ``models`` is loaded.
        held: the labels so far.
        early: whether a label may be given to a version that is not available, as long as it does
            not move there from another version, whose clients would be left without answers.

    Raises:
        ServingError: ``FAILED_PRECONDITION``, for the first label that may not be given.
    """
    labels: Labels = {}
    for one in models:
        for label, number in one.labels.items():
            ready = states.get(one.name, {}).get(number) == "AVAILABLE"
            moves = held.get(one.name, {}).get(label, number) != number
            if not ready and (moves or not early):
                raise ServingError(
                    "FAILED_PRECONDITION",
                    f"Request to assign label to version {number} of model {one.name}, which is "
                    "not currently available for inference",
                )
        labels[one.name] = dict(one.labels)
    return labels
