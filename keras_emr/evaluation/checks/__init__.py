"""Checks whether a robust accuracy can be believed: gradient masking, and plain mistakes.

=================  ===============================================================  ==============
id                 fails (or warns) when                                            needs
=================  ===============================================================  ==============
M1                 more survive PGD than FGSM, by > 0.5 points                      gradients
M2                 more survive PGD than Square or transfer, by > 0.2 points        gradients
M3                 an example survives PGD of radius 1 (linf), sqrt(d) (l2)         gradients
M4                 accuracy rises by > 0.5 points to a larger radius                gradients
M5                 PGD-200 with 5 restarts breaks > 2 points more than PGD-20       gradients
M6                 PGD on the DLR loss breaks > 5 points more than on CE            gradients
M7                 random points break an example that PGD left                     gradients or
                                                                                    result
M8                 gradients along a path differ by > 5 % from the difference of   gradients
                   its ends, at > 10 % of points
M9                 ``||g||_1 < 1e-12`` at > 1 % of points; NaN, Inf; warns where  gradients
                   only the cross-entropy has none, its ``p_y`` rounding to 1
M10                outputs of repeated calls differ by > 1e-4, or correct counts    --
M11                logits of training and inference mode are the same               Keras model
M12                an image leaves ball or box, has NaN, wrong shape or dtype       result
M13                rounding to 8 bits costs > 1 point of the success rate           result
M14                the result is not the worst case of its attacks by example       result
M15                > 1 point broken on the way, but not at the end of PGD (warns)   gradients
M16                PGD ends at a lower loss for > 5 % of examples                   gradients
M17                no adversarial image fools a sibling (warns)                     result,
                                                                                    siblings
M18                wrong examples counted as robust, a denominator other than N,    result
                   flags that the model contradicts
M19                attack accuracy is below the certified one                       certified
M20                an example survives PGD on a naturally trained model             natural
A-probabilities    the outputs are probabilities (warns for a function)             --
A-square           Square lowers the accuracy by > 0.2 points (warns)               result
A-classes          fewer than 4 classes (warns)                                     --
=================  ===============================================================  ==============

AutoAttack's other flags: "randomised" is M10, "zero gradients" M9. "Dynamic" has no counterpart:
the model is attacked as a pure function of the image.

Where a difference is that of a single example the verdict is "warn" and not "fail" (M1 to M7,
M13, M20). Sources: Carlini et al. (2019), "On evaluating adversarial robustness"; Athalye et al.
(ICML 2018); Pintor et al. (2021), M15; Croce and Hein (ICML 2020), the flags. Thresholds other
than the flags' are ours.
"""

from __future__ import annotations

import numpy as np

from keras_emr.errors import UserError
from keras_emr.evaluation.checks import (  # noqa: F401  each adds its checks to RULES
    accounting,
    attacks,
    examples,
    gradients,
    radii,
)
from keras_emr.evaluation.checks import model as _model  # noqa: F401
from keras_emr.evaluation.checks.base import RULES, VERDICTS, Budget, Check
from keras_emr.evaluation.checks.bench import Bench
from keras_emr.geometry import NORMS
from keras_emr.part import non_negative, one_of, whole

ORDER = (
    *(f"M{number}" for number in range(1, 21)),
    "A-probabilities",
    "A-square",
    "A-classes",
)

__all__ = ["ORDER", "VERDICTS", "Budget", "Check", "run_checks"]


def run_checks(
    model,
    x,
    y,
    epsilon,
    norm="linf",
    *,
    result=None,
    siblings=(),
    natural=None,
    certified=None,
    seed=0,
    batch_size=256,
    only=None,
    progress=None,
    budget=None,
):
    """Ask of a model, and of an evaluation of it, what would show that it misleads.

    The model is not changed. Accuracies are shares of all N examples; those that are wrong clean
    are not attacked. Attacks by gradient test the last iterate, as ``evaluate_attack`` does, in
    M1, M5 and M6, and every iterate in M2, M3, M4, M7 and M20. What lacks its input is "not run".

    Args:
        model: Keras classifier, or a function from images to scores (only what needs no
            gradients is run; see :func:`keras_emr.evaluation.target.as_target`).
        x: (N, H, W, C) images in [0, 1] to spend, e.g. the first 200 of the test set.
        y: (N,) integer labels.
        epsilon: radius, > 0, that the evaluation is about.
        norm: ``linf`` or ``l2``.
        result: outcome of the main evaluation on these examples: an object with ``correct``,
            ``robust``, ``x_adv`` and, if there are several, ``attacks``.
        siblings: other models of the same task (M2, M17).
        natural: a model trained without adversarial examples (M20).
        certified: verified accuracy on these examples, or (N,) bool (M19).
        seed: int.
        batch_size: images at a time.
        only: ids of the checks to make; ``None``: all.
        progress: called with a check's id, the number of checks done and their total.
        budget: :class:`Budget`; ``None``: the usual numbers.

    Returns:
        List of :class:`Check`, in the order of the table above.

    Raises:
        UserError: images, labels or options that mean nothing, logits that are not finite.
    """
    if non_negative("epsilon", epsilon) == 0:
        raise UserError("epsilon must be a number > 0. Received: 0.")
    one_of("norm", norm, NORMS)
    whole("batch_size", batch_size, 1)
    if np.ndim(x) != 4:
        raise UserError(f"x must be images (N, H, W, C). Received: shape {np.shape(x)}.")
    if not isinstance(siblings, list | tuple):
        raise UserError(f"siblings must be a list of models. Received: {type(siblings).__name__}.")
    if not isinstance(budget, Budget | None):
        raise UserError(f"budget must be a Budget. Received: {type(budget).__name__}.")
    ids = _chosen(only)
    _check_result(result)
    _check_certified(certified, len(x))
    bench = Bench(
        model,
        x,
        y,
        float(epsilon),
        norm,
        result,
        siblings,
        natural,
        certified,
        seed,
        batch_size,
        budget or Budget(),
    )
    checks = []
    for id in ids:
        checks.append(RULES[id](bench))
        if progress:
            progress(id, len(checks), len(ids))
    return checks


def _chosen(only):
    only = ORDER if only is None else [only] if isinstance(only, str) else list(only)
    for id in only:
        one_of("check", id, ORDER)
    return [id for id in ORDER if id in only]


def _check_result(result):
    missing = [n for n in ("correct", "robust", "x_adv") if not hasattr(result, n)]
    if result is not None and missing:
        raise UserError(
            f"result is not that of an evaluation. Received: {type(result).__name__} without "
            f"{', '.join(missing)}. Expected what evaluate_attack or AutoAttack gives."
        )


def _check_certified(certified, n):
    if certified is None:
        return
    values = np.asarray(certified)
    numeric = values.dtype.kind in "biuf"
    if values.shape not in ((), (n,)) or not numeric or not ((values >= 0) & (values <= 1)).all():
        raise UserError(
            f"certified must be an accuracy or a flag per example. Received: {certified!r}. "
            f"Expected a number in [0, 1], or {n} of true and false."
        )
