"""Where an attack starts: at the image, at noise around it, or where the outputs are diverse."""

from keras import ops

from keras_emr.backend import clip
from keras_emr.errors import UserError
from keras_emr.geometry import ascent, per_example, project
from keras_emr.geometry import norm as norm_of

STARTS = ("uniform", "gaussian", "none", "odi")
_ODI_STEPS = 2


def draw(kind, x, sampler, norm, classes):
    """The random numbers of a start, a tuple of tensors."""
    shape = ops.shape(x)
    if kind == "none":
        return ()
    if kind == "gaussian":
        return (sampler.normal(shape),)
    if norm == "linf":
        drawn = (sampler.uniform(shape),)
    else:
        drawn = (sampler.normal(shape), sampler.uniform((shape[0],), 0.0, 1.0))
    if kind == "odi":
        if classes is None:
            raise UserError(
                "the start 'odi' weighs the logits. Received: classes=None. Expected the number "
                "of classes."
            )
        drawn = (*drawn, sampler.uniform((shape[0], classes)))
    return drawn


def first_image(kind, objective, x, drawn, epsilon, norm):
    """The image an attack starts at.

    ``gaussian``: ``x + 0.001 n``, not clipped, as TRADES, MART and MAIL start. ``uniform``: in
    the Linf ball; in the L2 ball a Gaussian direction with radius uniform in [0, epsilon]; clipped
    to [0, 1]. ``odi`` (Tashiro et al., NeurIPS 2020): from there two steps of length epsilon that
    maximise ``w . logits``, ``w`` uniform in [-1, 1]^K per example. ``epsilon``: a number, or one
    for each example, shaped to broadcast against ``x``.
    """
    if kind == "none":
        return x
    if kind == "gaussian":
        return x + 0.001 * drawn[0]
    if norm == "linf":
        image = clip(x + epsilon * drawn[0], 0.0, 1.0)
    else:
        direction, radius = drawn[:2]
        delta = epsilon * direction * per_example(radius / norm_of(direction, "l2"), x)
        image = clip(x + delta, 0.0, 1.0)
    if kind == "odi":
        for _ in range(_ODI_STEPS):
            gradient = objective.output_gradient(image, drawn[-1])
            image = project(image + epsilon * ascent(gradient, norm), x, epsilon, norm)
    return image
