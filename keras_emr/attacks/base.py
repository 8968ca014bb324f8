"""What an attack is, and what it attacks."""

from __future__ import annotations

import copy

from keras import ops

from keras_emr import backend, losses
from keras_emr.attacks import starts
from keras_emr.geometry import NORMS
from keras_emr.part import Part, non_negative, one_of, whole

OBJECTIVES = ("cross_entropy", "kl", "margin", "soft_margin", "probability", "dlr")


class Objective:
    """The per-example quantity that an attack maximises, as a function of the image.

    Args:
        logits_fn: ``x -> logits``, weights frozen.
        name: ``cross_entropy``, ``kl`` (to the logits at ``x``; labels unused), ``margin``
            (Carlini-Wagner, kappa = 50), ``soft_margin`` (the SLM of MMA), ``probability`` (minus
            that of the true class) or ``dlr`` (difference of logits ratio).
        x: (N, H, W, C) clean images, the reference of ``kl``.
        y: (N,) integer labels; of mixed images every class's share (N, K), for ``cross_entropy``:
            whatever else looks at labels sees the dominant class.
        unroll: unroll loops (the step is compiled by XLA).
        passes: gradients are the mean over so many passes of a random model ("expectation over
            transformation", Athalye et al., ICML 2018); ``logits_fn`` then takes the number of
            the pass as well. Values and predictions come from the last one.
    """

    def __init__(self, logits_fn, name, x, y, unroll=False, passes=1):
        self.logits = logits_fn
        self.passes = passes
        self.name = name
        self.shares = y
        self.y = y if y is None else losses.dominant(y)
        self.target = None
        self.unroll = unroll
        self.reference = ops.stop_gradient(logits_fn(x)) if name == "kl" else None

    def towards(self, target):
        """This objective with a target class per example, (N,) integers; ``dlr`` only."""
        targeted = copy.copy(self)
        targeted.target = target
        return targeted

    def of_rows(self, rows):
        """This objective for some of the examples, a slice."""
        part = copy.copy(self)
        for name in ("shares", "y", "reference", "target"):
            value = getattr(self, name)
            setattr(part, name, None if value is None else value[rows])
        return part

    def loss(self, logits):
        """(N, K) logits -> (N,) objective."""
        if self.name == "kl":
            return losses.kl_divergence(self.reference, logits)
        if self.name == "margin":
            return losses.margin_loss(self.y, logits)
        if self.name == "dlr":
            return losses.dlr_loss(self.y, logits, self.target)
        if self.name == "soft_margin":
            return losses.soft_margin(self.y, logits)
        if self.name == "probability":
            return -ops.exp(-losses.cross_entropy(self.y, logits))
        return losses.cross_entropy(self.shares, logits)

    def value(self, x):
        """(N,) objective at the images ``x``."""
        return self.loss(self.logits(x))

    def value_and_gradient(self, x):
        """Objective (N,) and the input gradient of its *sum*, shape of ``x``; both detached."""
        value, _, gradient = self.look(x)
        return value, gradient

    def look(self, x):
        """Objective (N,), whether classified correctly (N,), gradient; one pass each way."""
        if self.passes == 1:
            return self._pass(x)

        def add(i, state):
            value, right, gradient = self._pass(x, i)
            return value, right, state[2] + gradient

        # A loop, not a sum of copies: fewer to compile where the backend keeps loops.
        rows = ops.zeros_like(losses.widen(x[:, 0, 0, 0]))
        nothing = (rows, ops.zeros_like(self.y, dtype="bool"), ops.zeros_like(x))
        value, right, total = backend.loop(self.passes, add, nothing, unroll=self.unroll)
        return value, right, total / self.passes

    def _pass(self, x, *number):
        return backend.value_and_grad(lambda x: self._both(x, *number), x)

    def _both(self, x, *number):
        logits = self.logits(x, *number)
        return self.loss(logits), losses.correct(self.y, logits)

    def gradient(self, x):
        """Input gradient of the *sum* of the per-example objectives, shape of ``x``."""
        return self.value_and_gradient(x)[1]

    def output_gradient(self, x, weights):
        """Input gradient of ``sum(weights * logits)``, weights (N, K); shape of ``x``."""

        def value(x):
            return ops.sum(weights * self.logits(x), axis=-1), ()

        return backend.value_and_grad(value, x)[2]


class Attack(Part):
    """An inner maximiser: ``attack(objective, x, sampler) -> x_adv``.

    One attack serves training and evaluation. A subclass gives ``step`` and, where its state is
    more than the current image, ``begin`` and ``result``. Random numbers are drawn in ``draw``
    and nowhere else: evaluation draws them on the host.

    Args:
        epsilon: radius of the ball, in units of [0, 1] images; >= 0.
        norm: ``linf`` or ``l2``.
        steps: iterations, >= 1.
        start: ``uniform``, ``gaussian``, ``none`` or ``odi`` (:func:`starts.first_image`).
            ``None``: the defense's own in training, ``uniform`` in evaluation.
        restarts: independent runs, >= 1. An example is broken if any run breaks it; of an
            unbroken example the run with the highest loss is returned.
        objective: what to maximise; ``None``: what the defense asks for in training,
            cross-entropy in evaluation.
    """

    name = "attack"
    # Whether it can be called inside a compiled training step.
    evaluation_only = False

    def __init__(self, epsilon, norm="linf", steps=10, start=None, restarts=1, objective=None):
        self.epsilon = non_negative("epsilon", epsilon)
        self.norm = one_of("norm", norm, NORMS)
        self.steps = whole("steps", steps, 1)
        self.start = one_of("start", start, (None, *starts.STARTS))
        self.restarts = whole("restarts", restarts, 1)
        self.objective = one_of("objective", objective, (None, *OBJECTIVES))

    def draw(self, x, sampler, classes=None):
        """Every random number of one run: a tuple of tensors. ``classes``: K, for ``odi``."""
        return starts.draw(self.start or "uniform", x, sampler, self.norm, classes)

    def begin(self, objective, x, drawn):
        """First state: a tuple of tensors."""
        kind = self.start or "uniform"
        return (starts.first_image(kind, objective, x, drawn, self.epsilon, self.norm),)

    def step(self, objective, x, state):
        """Next state; same structure, shapes and dtypes."""
        raise NotImplementedError

    def result(self, state):
        """The adversarial images in a state: by default its first entry, the last iterate."""
        return state[0]

    def runs(self, classes):
        """Independent runs in an evaluation of a model with so many classes."""
        return self.restarts

    def finished(self, state):
        """(N,) bool: examples that further steps cannot change; ``None`` if never known."""
        return None

    @property
    def variables(self):
        """Weights that the attack itself has."""
        return []

    def describe(self):
        """Name and every option as plain values, for reports."""
        options = self.get_config()
        if hasattr(self, "alpha"):
            options["step_size"] = self.alpha
        return {"name": self.name, **options}

    @property
    def stuck(self):
        """Whether it starts where its objective has no gradient: the KL divergence at ``x``."""
        return self.objective == "kl" and self.start == "none"

    def __call__(self, objective, x, sampler, classes=None):
        """Attack a batch inside a compiled step.

        Args:
            objective: :class:`Objective`.
            x: (N, H, W, C) images in [0, 1].
            sampler: source of random numbers (``keras_emr.sampling``).
            classes: number of classes, which the start ``odi`` needs.

        Returns:
            (N, H, W, C) adversarial images, within ``epsilon`` of ``x`` and in [0, 1], detached.
        """
        best = None
        for _ in range(self.restarts):
            state = backend.loop(
                self.steps,
                lambda i, state: self.step(objective, x, state),
                self.begin(objective, x, self.draw(x, sampler, classes)),
                unroll=objective.unroll,
            )
            found = ops.stop_gradient(self.result(state))
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

    # Options that are lengths, beside epsilon.
    lengths = ()

    def scaled(self, factor):
        """This attack with epsilon and its steps ``factor`` times as long, a scalar tensor.

        For use within a compiled step, which need not be compiled anew for another factor.
        """
        attack = copy.copy(self)
        for name in ("epsilon", *self.lengths):
            length = getattr(self, name)
            setattr(attack, name, None if length is None else length * factor)
        return attack

    def with_defaults(self, **defaults):
        """This attack with the options that were left at ``None`` filled in."""
        config = self.get_config()
        missing = {k: v for k, v in defaults.items() if k in config and config[k] is None}
        if not missing:
            return self  # also where epsilon is a tensor (`scaled`)
        return type(self)(**{**config, **missing})
