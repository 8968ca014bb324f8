"""What an attack is, and what it attacks."""

from __future__ import annotations

from keras import ops

from keras_emr import backend, losses
from keras_emr.geometry import NORMS
from keras_emr.part import Part, non_negative, one_of, whole

OBJECTIVES = ("cross_entropy", "kl", "margin")


class Objective:
    """The per-example quantity that an attack maximises, as a function of the image.

    Args:
        logits_fn: ``x -> logits``, weights frozen.
        name: ``cross_entropy``, ``kl`` (to the logits at ``x``; labels unused) or ``margin``
            (Carlini-Wagner, kappa = 50).
        x: (N, H, W, C) clean images, the reference of ``kl``.
        y: (N,) integer labels.
        unroll: unroll loops (the step is compiled by XLA).
    """

    def __init__(self, logits_fn, name, x, y, unroll=False):
        self.logits = logits_fn
        self.name = name
        self.y = y
        self.unroll = unroll
        self.reference = ops.stop_gradient(logits_fn(x)) if name == "kl" else None

    def loss(self, logits):
        """(N, K) logits -> (N,) objective."""
        if self.name == "kl":
            return losses.kl_divergence(self.reference, logits)
        if self.name == "margin":
            return losses.margin_loss(self.y, logits)
        return losses.cross_entropy(self.y, logits)

    def gradient(self, x):
        """Input gradient of the *sum* of the per-example objectives, shape of ``x``."""

        def value(x):
            logits = self.logits(x)
            return self.loss(logits), logits

        return backend.value_and_grad(value, x)[2]


class Attack(Part):
    """An inner maximiser: ``attack(objective, x, sampler) -> x_adv``.

    One attack serves training and evaluation. A subclass gives ``begin`` (the first state, a
    tuple of tensors of which the first is the current image) and ``step``.

    Args:
        epsilon: radius of the ball, in units of [0, 1] images; >= 0.
        norm: ``linf`` or ``l2``.
        steps: iterations, >= 1.
        restarts: independent runs, >= 1. An example is broken if any run breaks it; of an
            unbroken example the run with the highest loss is returned.
        objective: what to maximise; ``None``: what the defense asks for in training,
            cross-entropy in evaluation.
    """

    name = "attack"

    def __init__(self, epsilon, norm="linf", steps=10, restarts=1, objective=None):
        self.epsilon = non_negative("epsilon", epsilon)
        self.norm = one_of("norm", norm, NORMS)
        self.steps = whole("steps", steps, 1)
        self.restarts = whole("restarts", restarts, 1)
        self.objective = one_of("objective", objective, (None, *OBJECTIVES))

    def begin(self, x, sampler):
        """First state: a tuple of tensors, the current image first."""
        raise NotImplementedError

    def step(self, objective, x, state):
        """Next state; same structure, shapes and dtypes."""
        raise NotImplementedError

    def __call__(self, objective, x, sampler):
        """Attack a batch inside a compiled step.

        Args:
            objective: :class:`Objective`.
            x: (N, H, W, C) images in [0, 1].
            sampler: source of random numbers (``keras_emr.sampling``).

        Returns:
            (N, H, W, C) adversarial images, within ``epsilon`` of ``x`` and in [0, 1], detached.
        """
        best = None
        for _ in range(self.restarts):
            state = backend.loop(
                self.steps,
                lambda i, state: self.step(objective, x, state),
                self.begin(x, sampler),
                unroll=objective.unroll,
            )
            found = ops.stop_gradient(state[0])
            if self.restarts == 1:
                return found
            best = self._better(objective, best, found)
        return best[0]

    @staticmethod
    def _better(objective, best, found):
        """Merge two runs per example: broken beats unbroken, then the higher loss."""
        logits = objective.logits(found)
        loss, broken = objective.loss(logits), ~losses.correct(objective.y, logits)
        if best is None:
            return found, loss, broken
        wins = (broken & ~best[2]) | ((broken == best[2]) & (loss > best[1]))
        image_wins = ops.reshape(wins, (-1,) + (1,) * (len(found.shape) - 1))
        return (
            ops.where(image_wins, found, best[0]),
            ops.where(wins, loss, best[1]),
            broken | best[2],
        )

    def with_defaults(self, **defaults):
        """This attack with the options that were left at ``None`` filled in."""
        config = self.get_config()
        for key, value in defaults.items():
            if key in config and config[key] is None:
                config[key] = value
        return type(self)(**config)
