"""What attacks have in common that look for the nearest adversarial image."""

from keras import ops

from keras_emr.attacks.base import Attack
from keras_emr.geometry import NORMS, per_example
from keras_emr.geometry import norm as norm_of
from keras_emr.part import non_negative, one_of, whole


class MinimumNormAttack(Attack):
    """An attack whose result is the misclassified image nearest to ``x``, or else ``x`` itself.

    It knows no ball. ``epsilon`` only decides what an evaluation counts: with a number an example
    is broken if an image within ``epsilon`` was found; with ``None`` any distance counts
    (:func:`keras_emr.evaluation.distances.minimum_distances`).

    Subclasses give ``begin`` and ``step``, and keep in the state what ``result`` returns.

    Args:
        epsilon: radius of the ball, in units of [0, 1] images, or ``None``.
        norm: ``linf`` or ``l2``: the distance that is made small.
        steps: iterations, >= 1.
        restarts: independent runs, >= 1.
    """

    name = "minimum-norm"
    evaluation_only = True
    bounded = False
    objective = None
    start = "none"
    norms = NORMS

    def __init__(self, epsilon=None, norm="linf", steps=100, restarts=1):
        self.epsilon = None if epsilon is None else non_negative("epsilon", epsilon)
        self.norm = one_of("norm", norm, self.norms)
        self.steps = whole("steps", steps, 1)
        self.restarts = whole("restarts", restarts, 1)

    def draw(self, x, sampler, classes=None):
        return ()


def nearer(image, wrong, x, best, distance, norm):
    """Keep the nearest misclassified image: the new ``(best, distance)``.

    Args:
        image: (N, H, W, C) candidates.
        wrong: (N,) bool, whether they are misclassified.
        x: clean images.
        best: nearest so far.
        distance: (N,) its distance, ``inf`` if there is none yet.
        norm: ``linf`` or ``l2``.
    """
    reached = norm_of(image - x, norm)
    better = wrong & (reached < distance)
    return (
        ops.where(per_example(better, image), image, best),
        ops.where(better, reached, distance),
    )
