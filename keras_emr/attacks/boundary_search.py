"""How far along the direction of an attack the boundary lies (AN-PGD: Ding et al., 2020)."""

import copy

from keras import ops

from keras_emr import backend
from keras_emr.geometry import per_example

# Beyond the margin wanted, so that an example that has it can be told from one that has not.
REACH = 1.05
# step size * steps / radius, in either norm
_STEP_RATIO = 2.5


def search(attack, objective, x, sampler, radius, limit, trials):
    """Attack every example at a radius of its own, then bisect for the boundary's distance.

    Along ``u = (x_adv - x) / radius`` the first distance tried is the radius itself; the objective
    is >= 0 beyond the boundary. After ``trials`` halvings of [0, limit] the last middle is taken.

    Args:
        attack: :class:`keras_emr.attacks.pgd.PGD`; its epsilon is not used, and its step size only
            if it was given.
        objective: :class:`Objective`, negative on the example's own side: ``soft_margin``.
        x: (N, H, W, C) images in [0, 1].
        sampler: source of random numbers.
        radius: (N,) of the attack, > 0.
        limit: largest distance.
        trials: halvings.

    Returns:
        ``(x_adv, distance)``: (N, H, W, C) images in [0, 1] and (N,), both detached.
    """
    sized, size = copy.copy(attack), per_example(radius, x)
    sized.epsilon = size
    if attack.step_size is None:
        sized.step_size = _STEP_RATIO * size / attack.steps
    direction = (sized(objective, x, sampler) - x) / (size + 1e-12)

    def at(distance):
        return ops.clip(x + per_example(distance, x) * direction, 0.0, 1.0)

    def halve(_, state):
        distance, low, high = state
        beyond = objective.value(at(distance)) >= 0
        low = ops.where(beyond, low, ops.maximum(low, distance))
        high = ops.where(beyond, ops.minimum(high, distance), high)
        return (low + high) / 2, low, high

    state = (radius, ops.zeros_like(radius), ops.zeros_like(radius) + limit)
    distance, _, _ = backend.loop(trials, halve, state, unroll=objective.unroll)
    return ops.stop_gradient(at(distance)), ops.stop_gradient(distance)
