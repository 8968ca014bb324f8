"""Per-example losses on logits, in float32 or wider, shared by attacks and defenses.

Everywhere: ``y`` (N,) integer labels, logits (N, K), results (N,). Only :func:`cross_entropy` takes
shares of the classes instead of labels.
"""

import keras
from keras import ops


def widen(logits):
    """Logits in at least float32: MART's constants vanish in half precision."""
    logits = ops.convert_to_tensor(logits)
    dtype = keras.backend.standardize_dtype(logits.dtype)
    return ops.cast(logits, "float32") if dtype in ("float16", "bfloat16") else logits


def one_hot(index, like):
    """Rows of ones and zeros in the shape and dtype of ``like`` (N, K).

    Not ``ops.one_hot``: on torch that reads the indices back to check their range.
    """
    classes = ops.arange(like.shape[-1], dtype="int32")
    return ops.cast(ops.equal(ops.cast(index, "int32")[:, None], classes[None, :]), like.dtype)


def pick(values, index):
    """``values[i, index[i]]``: (N, K), (N,) -> (N,)."""
    return ops.sum(values * one_hot(index, values), axis=-1)


def runner_up(values, y):
    """Index of the largest entry that is not ``y``: (N, K), (N,) -> (N,). No gradient."""
    values = ops.stop_gradient(values)
    others = ops.where(one_hot(y, values) > 0, -float("inf"), values)
    return ops.argmax(others, axis=-1)


def is_soft(y):
    """Whether ``y`` holds every class's share (N, K), as mixed images have, instead of labels."""
    return len(y.shape) == 2


def dominant(y):
    """(N,) int32 labels: ``y`` itself, or the class of the largest share."""
    return ops.cast(ops.argmax(y, axis=-1) if is_soft(y) else y, "int32")


def shares(y, like):
    """``y`` as shares of the classes, in the shape and dtype of ``like`` (N, K)."""
    return ops.cast(y, like.dtype) if is_soft(y) else one_hot(y, like)


def cross_entropy(y, logits, smoothing=0.0, margin=0.0):
    """``-log p_y``; smoothed: ``-(1 - s) log p_y - s / (K - 1) sum_{k != y} log p_k``.

    Source of the smoothing: "Bag of Tricks for AT" (Pang et al., ICLR 2021). In the terms of
    Keras's own losses this is ``s K / (K - 1)``.

    Args:
        y: (N,) labels, or (N, K) shares of the classes: ``log p_y`` is then their mean.
        margin: taken off the logit of ``y`` before the softmax, as additive-margin softmax has it.
    """
    logits = widen(logits)
    if margin:
        logits = logits - margin * shares(y, logits)
    log_p = ops.log_softmax(logits, axis=-1)
    right = ops.sum(shares(y, log_p) * log_p, axis=-1)
    if not smoothing:
        return -right
    others = ops.sum(log_p, axis=-1) - right
    return -(1.0 - smoothing) * right - smoothing / (log_p.shape[-1] - 1) * others


def kl_divergence(reference_logits, logits):
    """``KL(p || q) = sum_k p_k (log p_k - log q_k)``, ``p`` the reference. Not detached."""
    log_p = ops.log_softmax(widen(reference_logits), axis=-1)
    log_q = ops.log_softmax(widen(logits), axis=-1)
    return ops.sum(ops.exp(log_p) * (log_p - log_q), axis=-1)


def margin_loss(y, logits, kappa=50.0):
    """Carlini-Wagner margin loss ``-max(0, z_y - max_{k != y} z_k + kappa)`` of CW-PGD."""
    logits = widen(logits)
    margin = pick(logits, y) - pick(logits, runner_up(logits, y))
    return -ops.relu(margin + kappa)


def soft_margin(y, logits):
    """``log sum_{k != y} exp z_k - z_y``, the SLM of MMA: negative where surely correct."""
    logits = widen(logits)
    others = ops.where(one_hot(y, logits) > 0, -float("inf"), logits)
    return ops.logsumexp(others, axis=-1) - pick(logits, y)


def dlr_loss(y, logits, target=None):
    """Difference of logits ratio, which scaling the logits does not change.

    Untargeted: ``-(z_y - max_{k != y} z_k) / (z_(1) - z_(3) + 1e-12)``, targeted:
    ``-(z_y - z_t) / (z_(1) - (z_(3) + z_(4)) / 2 + 1e-12)``, where ``z_(i)`` is the i-th largest
    logit. With too few classes for that (2; 3 with a target) the numerator alone: attacks that
    take signs, normalise gradients and compare values of one example need no scale.

    Args:
        target: (N,) integer classes, or ``None``.

    Source: Croce and Hein, ICML 2020 (AutoAttack).
    """
    logits = widen(logits)
    rival = runner_up(logits, y) if target is None else target
    gap = pick(logits, rival) - pick(logits, y)
    classes = logits.shape[-1]
    if classes < (3 if target is None else 4):
        return gap
    ordered = ops.flip(ops.sort(logits, axis=-1), axis=-1)
    low = ordered[:, 2] if target is None else (ordered[:, 2] + ordered[:, 3]) / 2
    return gap / (ordered[:, 0] - low + 1e-12)


def boosted_cross_entropy(y, logits, margin=0.0):
    """MART: ``-log q_y - log(1.0001 - q_k* + 1e-12)``, ``k*`` the strongest wrong class.

    ``margin`` as in :func:`cross_entropy`; both terms see it.
    """
    logits = widen(logits)
    if margin:
        logits = logits - margin * one_hot(y, logits)
    q = ops.softmax(logits, axis=-1)
    strongest_wrong = pick(q, runner_up(logits, y))
    return cross_entropy(y, logits) - ops.log(1.0001 - strongest_wrong + 1e-12)


def weighted_kl(y, reference_logits, logits):
    """MART: ``(1.0000001 - p_y) * sum_k p_k (log p_k - log(q_k + 1e-12))``.

    The weight is the clean probability of the true class, and gradients flow through it.
    """
    log_p = ops.log_softmax(widen(reference_logits), axis=-1)
    p = ops.exp(log_p)
    q = ops.softmax(widen(logits), axis=-1)
    divergence = ops.sum(p * (log_p - ops.log(q + 1e-12)), axis=-1)
    return (1.0000001 - pick(p, y)) * divergence


def probabilistic_margin(y, logits, rival_logits=None):
    """MAIL: ``p_y(logits) - max_{k != y} p_k(rival_logits)``, positive where correct.

    ``rival_logits`` are the same logits unless given.
    """
    p = ops.softmax(widen(logits), axis=-1)
    rival = p if rival_logits is None else ops.softmax(widen(rival_logits), axis=-1)
    return pick(p, y) - pick(rival, runner_up(rival, y))


def correct(y, logits):
    """Whether the arg-max class is ``y``: (N,) bool."""
    return ops.equal(ops.argmax(logits, axis=-1), ops.cast(y, "int32"))
