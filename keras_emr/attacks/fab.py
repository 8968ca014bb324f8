"""Fast adaptive boundary attack, FAB and FAB-T (Croce and Hein, ICML 2020)."""

from typing import Any, NamedTuple

from keras import ops

from keras_emr import losses
from keras_emr.attacks.hyperplane import displacement, nearest_boundary, survey
from keras_emr.attacks.minimum_norm import MinimumNormAttack, nearer
from keras_emr.errors import UserError
from keras_emr.geometry import norm as norm_of
from keras_emr.geometry import per_example
from keras_emr.part import non_negative, register, whole

_TINY = 1e-12
_SHORT = 1e-8


class State(NamedTuple):
    """State of a run."""

    point: Any  # (N, H, W, C): where the next step starts
    best: Any  # nearest misclassified image, else ``x``
    distance: Any  # (N,) its distance, ``inf`` if there is none
    rivals: Any  # (N, R) int32 classes whose boundaries are looked at


@register
class FAB(MinimumNormAttack):
    """FAB: along the boundary of the label's region, drawn towards the image.

    Per step from ``v`` (at first ``x``), with ``f_k = z_k - z_y``, ``w_k`` its input gradient and
    ``k`` the class with the smallest ``|f_k| / (1e-12 + ||w_k||_q)`` (``q`` = 1 for Linf, 2 for
    L2): ``d_v`` and ``d_x`` are the shortest ways inside the box from ``v`` and ``x`` to the
    hyperplane ``f_k + <w_k, . - v> = 0`` (:func:`hyperplane.displacement`), and::

        alpha = min(|d_v| / (|d_v| + |d_x|), alpha_max)            (lengths of at least 1e-8)
        v <- clip01((1 - alpha) (v + eta d_v) + alpha (x + eta d_x))
        if v is misclassified: keep it if it is the nearest so far, and v <- x + beta (v - x)

    On a linear model the default ``eta`` and ``beta`` come to within 0.6 % of the least distance:
    every return to the boundary overshoots it a little.

    Args:
        epsilon, norm: see :class:`MinimumNormAttack`; ``epsilon`` also scales the random starts.
        steps: iterations, >= 1. Each costs K - 1 input gradients and one more forward pass.
        restarts: runs, >= 1. The first starts at ``x``, each later one at distance ``epsilon / 2``
            in a direction drawn uniformly in [-1, 1] per pixel (Linf) or Gaussian (L2), clipped to
            [0, 1]. (The authors' code takes half the best distance where that is below epsilon.)
        alpha_max: largest share of the step that begins at ``x``, in [0, 1].
        eta: overshoot, >= 0: 1 ends on the hyperplane.
        beta: what a misclassified point keeps of its way, in [0, 1].

    Raises:
        UserError: for ``restarts`` above 1 without ``epsilon``, and for options out of range.
    """

    name = "fab"

    def __init__(
        self,
        epsilon=None,
        norm="linf",
        steps=100,
        restarts=1,
        alpha_max=0.1,
        eta=1.05,
        beta=0.9,
    ):
        super().__init__(epsilon, norm, steps, restarts)
        if self.epsilon is None and self.restarts > 1:
            raise UserError(
                f"{self.name} starts its further runs at a distance that epsilon gives. Received: "
                f"epsilon=None, restarts={restarts!r}. Expected epsilon >= 0, or restarts=1."
            )
        self.alpha_max = _share("alpha_max", alpha_max)
        self.eta = non_negative("eta", eta)
        self.beta = _share("beta", beta)

    def draw(self, x, sampler, classes=None):
        return self._start(x, sampler, getattr(sampler, "restart", 0))

    def _start(self, x, sampler, restart):
        """Radius and direction of the start; nothing if every run starts at ``x``."""
        if self.restarts == 1:
            return ()
        noise = (sampler.uniform if self.norm == "linf" else sampler.normal)(ops.shape(x))
        # A tensor, so that the first run is not compiled for itself.
        radius = 0.5 * self.epsilon if restart else 0.0
        return ops.convert_to_tensor(radius, dtype=x.dtype), noise

    def begin(self, objective, x, drawn):
        rivals, distance = survey(objective, x)
        point = x
        if drawn:
            radius, noise = drawn
            length = norm_of(noise, self.norm)
            length = ops.where(length > 0, length, ops.ones_like(length))
            point = ops.clip(x + radius * noise / per_example(length, noise), 0.0, 1.0)
        return State(point, x, distance, rivals)

    def step(self, objective, x, state):
        s = state
        f, w, _ = nearest_boundary(objective, s.point, s.rivals, self.norm, _TINY)
        axes = tuple(range(1, len(x.shape)))
        gap = ops.concatenate([f, f + ops.sum(w * (x - s.point), axis=axes)])
        # Both at once: on an accelerator the projection is many small operations.
        ways = displacement(ops.concatenate([s.point, x]), ops.concatenate([w, w]), gap, self.norm)
        near, far = ops.split(ways, 2, axis=0)
        alpha = per_example(self._share_of_x(near, far), x)
        moved = (1 - alpha) * (s.point + self.eta * near) + alpha * (x + self.eta * far)
        moved = ops.clip(moved, 0.0, 1.0)
        wrong = ~losses.correct(objective.y, objective.logits(moved))
        best, distance = nearer(moved, wrong, x, s.best, s.distance, self.norm)
        back = x + self.beta * (moved - x)
        return State(ops.where(per_example(wrong, x), back, moved), best, distance, s.rivals)

    def _share_of_x(self, near, far):
        """``alpha``, (N,)."""
        near, far = (norm_of(way, self.norm) for way in (near, far))
        near, far = (ops.where(a > _SHORT, a, ops.full_like(a, _SHORT)) for a in (near, far))
        share = near / (near + far)
        return ops.where(share < self.alpha_max, share, ops.full_like(share, self.alpha_max))

    def result(self, state):
        return state.best


@register
class FABTargeted(FAB):
    """FAB-T: FAB towards one class per run, at one input gradient per step for any K.

    Run ``r`` looks at one boundary only: between the label and the wrong class whose logit at
    ``x`` is the ``r mod targets + 1``-th largest. Any misclassification counts. A run's number is
    the sampler's ``restart``.

    Args:
        targets: classes aimed at, >= 1; with fewer wrong classes, those.
        restarts: runs per target.
        epsilon, norm, steps, alpha_max, eta, beta: see :class:`FAB`.
    """

    name = "fab-t"

    def __init__(
        self,
        epsilon=None,
        norm="linf",
        steps=100,
        restarts=1,
        alpha_max=0.1,
        eta=1.05,
        beta=0.9,
        targets=9,
    ):
        super().__init__(epsilon, norm, steps, restarts, alpha_max, eta, beta)
        self.targets = whole("targets", targets, 1)

    def _targets(self, classes):
        return self.targets if classes is None else min(self.targets, classes - 1)

    def runs(self, classes):
        return self._targets(classes) * self.restarts

    def draw(self, x, sampler, classes=None):
        restart, rank = divmod(getattr(sampler, "restart", 0), self._targets(classes))
        rank = ops.convert_to_tensor(rank, dtype="int32")
        return (rank, *self._start(x, sampler, restart))

    def begin(self, objective, x, drawn):
        state = super().begin(objective, x, drawn[1:])
        target = ops.take(state.rivals, drawn[0], axis=-1)
        return state._replace(rivals=target[:, None])


def _share(field, value):
    """``value`` as a float. Raises :class:`UserError` unless it is a number in [0, 1]."""
    if non_negative(field, value) > 1:
        raise UserError(f"{field} must be in [0, 1]. Received: {value!r}.")
    return float(value)
