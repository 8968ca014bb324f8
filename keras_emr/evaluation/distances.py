"""How far the nearest adversarial image is that a minimum-norm attack finds."""

from __future__ import annotations

import numpy as np

from keras_emr.errors import UserError
from keras_emr.evaluation.robust_accuracy import clean_pass
from keras_emr.evaluation.session import open_session, perturbation, portions
from keras_emr.evaluation.target import as_target


def minimum_distances(model, attack, x, y, *, batch_size=256, seed=0, progress=None, classes=None):
    """Distance from each image to the nearest misclassified one that ``attack`` finds.

    An upper bound of the distance to the decision boundary. Of several runs (restarts, targets)
    the nearest image counts.

    Args:
        model, x, y, batch_size, seed, progress, classes: see
            :func:`keras_emr.evaluate_attack`.
        attack: a minimum-norm attack with ``epsilon=None``: ``FAB``, ``FABTargeted``,
            ``DeepFool``, ``CarliniWagner``, ``BoundaryAttack``, ``HopSkipJump``, ``SignOPT``.

    Returns:
        (N,) float64 norms, in units of [0, 1] images; 0 where the clean image is misclassified,
        ``inf`` where nothing was found.

    Raises:
        UserError: another kind of attack, and as :func:`keras_emr.evaluate_attack`.
    """
    if getattr(attack, "bounded", True) or attack.epsilon is not None:
        raise UserError(
            "distances need a minimum-norm attack that knows no ball. Received: "
            f"{attack.name!r}, epsilon={attack.epsilon!r}. Expected for example FAB(norm='l2')."
        )
    batch_size = min(batch_size, max(len(x), 1))
    target = as_target(model, np.shape(x)[1:], classes, batch_size)
    x, y, correct = clean_pass(target, x, y)
    session = open_session(target, attack, batch_size)
    distance = np.where(correct, np.inf, 0.0)
    todo, runs = np.flatnonzero(correct), attack.runs(target.classes)
    done = 0
    for run in range(runs):
        for index in portions(session, todo):
            found = session.find(x[index], y[index], index, run, seed)
            norms = perturbation(attack.norm, x[index], found.images)
            distance[index] = np.minimum(distance[index], np.where(found.broken, norms, np.inf))
            done += len(index)
            if progress:
                progress(done, runs * len(todo))
    return distance
