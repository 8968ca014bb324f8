"""Which combinations of the logits EMR differentiates: cotangents ``c`` of shape (N, K).

Every rule returns a list of ``(c, factor)``; the penalty is ``sum factor * ||J^T c||``-power. All
are constants: no gradient flows through them.
"""

from keras import ops

from keras_emr.losses import one_hot, runner_up


def softmax(logits, y, temperature, sampler):
    return [(ops.softmax(logits / temperature, axis=-1), 1.0)]


def predicted(logits, y, temperature, sampler):
    return [(one_hot(ops.argmax(logits, axis=-1), logits), 1.0)]


def true(logits, y, temperature, sampler):
    return [(one_hot(y, logits), 1.0)]


def sampled(logits, y, temperature, sampler):
    return [(one_hot(sampler.categorical(logits / temperature), logits), 1.0)]


def uniform(logits, y, temperature, sampler):
    return [(ops.full_like(logits, 1.0 / logits.shape[-1]), 1.0)]


def runner_up_difference(logits, y, temperature, sampler):
    return [(one_hot(y, logits) - one_hot(runner_up(logits, y), logits), 1.0)]


def rademacher(logits, y, temperature, sampler):
    signs = ops.where(sampler.uniform(ops.shape(logits)) < 0, -1.0, 1.0)
    return [(ops.cast(signs, logits.dtype), 1.0)]


def sphere(logits, y, temperature, sampler):
    """Uniform on the unit sphere; K times its penalty estimates the whole Jacobian's."""
    direction = ops.cast(sampler.normal(ops.shape(logits)), logits.dtype)
    length = ops.sqrt(ops.sum(ops.square(direction), axis=-1, keepdims=True))
    return [(direction / length, float(logits.shape[-1]))]


def exact(logits, y, temperature, sampler):
    """Every class in turn: the squared Frobenius norm of the Jacobian. K backward passes."""
    classes = range(logits.shape[-1])
    labels = ops.zeros_like(ops.argmax(logits, axis=-1))
    return [(one_hot(labels + k, logits), 1.0) for k in classes]


RULES = {
    rule.__name__: rule
    for rule in (
        softmax,
        predicted,
        true,
        sampled,
        uniform,
        runner_up_difference,
        rademacher,
        sphere,
        exact,
    )
}


def cotangents(name, logits, y, temperature, center, sampler):
    """The cotangents of rule ``name``; ``center`` subtracts each one's mean over the classes."""
    logits = ops.stop_gradient(logits)
    pairs = [
        (ops.stop_gradient(c), factor) for c, factor in RULES[name](logits, y, temperature, sampler)
    ]
    if center:
        pairs = [(c - ops.mean(c, axis=-1, keepdims=True), factor) for c, factor in pairs]
    return pairs


def combine(cotangent, logits):
    """``sum_k c_k z_k``: (N, K), (N, K) -> (N,)."""
    return ops.sum(cotangent * logits, axis=-1)
