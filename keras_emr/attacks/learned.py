"""The learned inner maximizer as an attack (Xiong & Hsieh, ECCV 2020), and how it is trained."""

from __future__ import annotations

import math

import keras
from keras import ops

from keras_emr import backend
from keras_emr.attacks.base import Attack
from keras_emr.errors import UserError
from keras_emr.maximizers import as_maximizer, attack_options
from keras_emr.part import non_negative, one_of, register, whole

STEP_WEIGHTS = ("linear", "uniform", "last")


@register
class LearnedAttack(Attack):
    """T steps whose direction and length a trained network proposes.

    ``x'_{t+1} = Pi(x'_t + s m_phi(g_t))``, ``g_t`` the input gradient of the summed objective, a
    constant for ``phi``; ``Pi`` projects on the Linf ball and [0, 1]; ``s`` is epsilon, or the
    maximizer's ``scale``. In training (:meth:`meta_gradient`) ``phi`` *ascends*

        ``L(phi) = mean_i sum_{t=1..T} w_t l_i(x'_t)``.

    Args:
        epsilon, objective, restarts: see :class:`Attack`.
        norm: ``linf``, the only one.
        maximizer: a :class:`LearnedMaximizer`, a :class:`Generator`, or ``lstm`` or ``rnn`` for a
            fresh one (:meth:`named` gives the generators' methods).
        steps: T. A trained maximizer can be run for more steps than in training.
        start: see :class:`Attack`; by default ``gaussian``, projected.
        start_noise: its standard deviation.
        step_weights: ``w_t``, normalised to sum 1: ``linear`` (t), ``uniform``, ``last``, or T
            numbers >= 0.
        bptt_horizon: truncate the chain of gradients every so many steps; ``None``: never.
        latent: accumulate the steps before projection: ``z_{t+1} = z_t + s m_phi``,
            ``x'_t = Pi(z_t)``.
        learn_share: share of a batch, in (0, 1], that ``phi`` learns from; all of it is attacked.
            ``L(phi)`` is then the mean over these images, the first ones: an estimate of the same,
            at a lower price. The few hundred weights serve every pixel of every image.
        straight_through: let gradients of ``phi`` pass the projection unchanged, instead of
            stopping them where a pixel was clipped.

    Raises:
        UserError: an option out of range, or a norm other than ``linf``.
    """

    name = "learned"

    def __init__(
        self,
        epsilon,
        norm="linf",
        maximizer="lstm",
        steps=10,
        start="gaussian",
        start_noise=0.001,
        step_weights="linear",
        bptt_horizon=None,
        latent=False,
        straight_through=False,
        learn_share=1.0,
        restarts=1,
        objective=None,
    ):
        super().__init__(epsilon, norm, steps, start, restarts, objective)
        if norm != "linf":
            raise UserError(
                f"a learned maximizer works in the linf ball. Received: norm={norm!r}. Use pgd."
            )
        self.maximizer = as_maximizer(maximizer)
        self.start_noise = non_negative("start_noise", start_noise)
        self.weights = _normalized(step_weights, steps)
        self.step_weights = step_weights if isinstance(step_weights, str) else list(step_weights)
        self.bptt_horizon = bptt_horizon
        if bptt_horizon is not None:
            whole("bptt_horizon", bptt_horizon, 1)
        self.latent = latent
        self.straight_through = straight_through
        self.learn_share = non_negative("learn_share", learn_share)
        if not 0 < self.learn_share <= 1:
            raise UserError(f"learn_share must be in (0, 1]. Received: {learn_share!r}.")

    @classmethod
    def named(cls, name, epsilon, maximizer=None, **options):
        """The method called ``name``, with its own number of steps and so on unless given.

        Args:
            name: ``lstm``, ``rnn``, ``generator-naive``, ``generator-gradient``,
                ``generator-multistep`` (learning to learn, Jiang et al., AISTATS 2021) or ``gat``
                (Lee et al., 2017; its constants are as others recall them).
            maximizer: the layer; ``None``: a fresh one.
        """
        return cls(epsilon, **{"maximizer": maximizer or name, **attack_options(name), **options})

    @property
    def stuck(self):
        return super().stuck and self.maximizer.reads_gradient

    @property
    def variables(self):
        return self.maximizer.variables

    def draw(self, x, sampler, classes=None):
        if not self.maximizer.built:  # a fresh generator: it learns of the channels only here
            self.maximizer.build(x.shape)
        return super().draw(x, sampler, classes)

    def begin(self, objective, x, drawn):
        if self.start == "gaussian":
            # Projected, unlike the start of the same name elsewhere: the unroll then never leaves
            # the ball, and the first step's clipping mask is right.
            image = self._project(x + self.start_noise * drawn[0], x)
        else:
            (image,) = super().begin(objective, x, drawn)
        return (image, *((image,) * self.latent), *self.maximizer.initial_state(x))

    def step(self, objective, x, state):
        gradient = objective.gradient(state[0]) if self.maximizer.reads_gradient else None
        state = self._move(x, state, gradient)
        return keras.tree.map_structure(ops.stop_gradient, state)

    def _move(self, x, state, gradient):
        """The state after one proposed step; differentiable in the maximizer's weights."""
        image, memory = state[0], state[1 + self.latent :]
        proposed, memory = self.maximizer.call(image, gradient, memory)
        scale = self.epsilon if self.maximizer.scale is None else self.maximizer.scale
        moved = state[int(self.latent)] + scale * proposed
        return (self._project(moved, x), *((moved,) * self.latent), *memory)

    def _project(self, moved, x):
        """Onto the ball and [0, 1], with the mask of its gradient written out.

        At a tie the derivative of clipping differs by backend; many pixels are exactly 0 or 1.
        """
        low = backend.clip(x - self.epsilon, 0.0, 1.0)
        high = backend.clip(x + self.epsilon, 0.0, 1.0)
        clipped = ops.stop_gradient(ops.minimum(ops.maximum(moved, low), high))
        if self.straight_through:
            return clipped + (moved - ops.stop_gradient(moved))
        return ops.where((moved > low) & (moved < high), moved, clipped)

    def unroll(self, objective, x, state):
        """All steps, differentiable in ``phi``, at the price of T + 1 input gradients.

        ``g_t`` is a constant for ``phi``, so ``sum_t w_t <g_t, x'_t(phi)>`` has exactly the
        gradient of ``sum_t w_t l(x'_t(phi))``: the network is never differentiated twice and none
        of its activations outlives a step. The last gradient, and the way back through the cells,
        are those of the first images alone (``learn_share``).

        Returns:
            ``(surrogate, (x_adv, value))``: mean over the images that ``phi`` learns from, scalar;
            last images (N, H, W, C); the objective at the former.
        """
        total = 0.0

        def learn(weight, before, image, gradient, slope):
            nonlocal total
            if weight > 0:
                total = total + weight * self._gain(before, image, slope)

        images, value = self._run(objective, x, state, learn)
        return total / ops.cast(ops.shape(value)[0], x.dtype), (images, value)

    def _run(self, objective, x, state, learn):
        """All steps; after each ``learn`` is called with what ``phi`` can learn from.

        Args:
            learn: ``(w_t, before, after, gradient, slope)``: the images that ``phi`` learns from
                before and after the step, and the objective's gradients there. ``None`` for one
                that was not computed: the first where the maximizer reads none, the second where
                moreover, or at the last step, ``w_t`` is zero.

        Returns:
            ``(x_adv, value)`` as of :meth:`unroll`.
        """
        reads = self.maximizer.reads_gradient
        gradient = objective.gradient(ops.stop_gradient(state[0])) if reads else None
        parts = self._learners(x)
        learners = objective.of_rows(parts[0])
        # The cells' zeros need no products.
        states = [tuple(s[rows] for s in state[: 1 + self.latent]) for rows in parts]
        for t, weight in enumerate(self.weights):
            if t and self.bptt_horizon and t % self.bptt_horizon == 0:
                states = keras.tree.map_structure(ops.stop_gradient, states)
            before = states[0][0]
            seen = [gradient[rows] if reads else None for rows in parts]
            states = [
                self._move(x[rows], state, part)
                for rows, state, part in zip(parts, states, seen, strict=True)
            ]
            if len(states) > 1:
                states[1] = keras.tree.map_structure(ops.stop_gradient, states[1])
            image, slope = ops.stop_gradient(states[0][0]), None
            last = t + 1 == self.steps
            if reads and not last:
                gradient = objective.gradient(_joined(image, states))
                slope = gradient[parts[0]]
            elif weight > 0:
                value, slope = learners.value_and_gradient(image)
            else:
                value = ops.stop_gradient(learners.value(image))
            learn(weight, before, states[0][0], seen[0], slope)
        return _joined(image, states), value

    def _gain(self, before, image, slope):
        """What a step adds to the surrogate, summed over the images."""
        return ops.sum(slope * image) - self.maximizer.penalty(image - before)

    def _replay(self, x, state, gradients):
        """:meth:`unroll`'s surrogate, summed, from the gradients (T + 1) that a run has met."""

        def step(carry, record):
            state, total = carry
            gradient, slope, weight, cut = record
            if self.bptt_horizon:
                state = tuple(ops.where(cut, ops.stop_gradient(s), s) for s in state)
            moved = self._move(x, state, gradient)
            return moved, total + weight * self._gain(state[0], moved[0], slope)

        gradients, weights = ops.stack(gradients), ops.convert_to_tensor(self.weights, x.dtype)
        # Of its own, because it starts without the cells' zeros.
        first = gradients[0], gradients[1], weights[0], False
        carry = step((state, ops.zeros((), x.dtype)), first)
        if self.steps > 1:
            horizon = self.bptt_horizon or self.steps
            cuts = [t % horizon == 0 for t in range(1, self.steps)]
            cuts = ops.convert_to_tensor(cuts, "bool")
            carry = backend.chain(step, carry, (gradients[1:-1], gradients[2:], weights[1:], cuts))
        return carry[1]

    def _learners(self, x):
        """Rows of the images that ``phi`` learns from, and of the others if there are any."""
        if self.learn_share == 1:
            return [slice(None)]
        size = x.shape[0]
        if size is None:
            size = ops.cast(ops.shape(x)[0], "float32")
            count = ops.cast(ops.ceil(size * self.learn_share), "int32")
        else:
            count = math.ceil(size * self.learn_share)
            if count == size:
                return [slice(None)]
        return [slice(None, count), slice(count, None)]

    def meta_gradient(self, objective, x, drawn):
        """Attack a batch and find the direction in which ``phi`` would have attacked it better.

        Args:
            objective: :class:`Objective`.
            x: (N, H, W, C) images in [0, 1].
            drawn: random numbers of :meth:`draw`.

        Returns:
            ``(x_adv, value, gradients)``: adversarial images, the objective at those of them that
            ``phi`` learns from, and the gradient of ``L(phi)`` by each weight of the maximizer.
        """
        state = self.begin(objective, x, drawn)
        if backend.chain and getattr(self.maximizer, "replayable", False):
            found, surrogate = self._recorded(objective, x, state)
        else:
            found, surrogate = None, lambda: self.unroll(objective, x, state)
        weights = [ops.stop_gradient(ops.convert_to_tensor(v)) for v in self.variables]

        def of_weights(weights):
            with keras.StatelessScope(list(zip(self.variables, weights, strict=True))):
                return surrogate()

        unrolled, gradients = backend.gradient(of_weights, weights)
        x_adv, value = unrolled if found is None else found
        return x_adv, value, gradients

    def _recorded(self, objective, x, state):
        """The attack, run without derivatives, and the surrogate that repeats its cells alone."""
        rows = self._learners(x)[0]
        gradients = []

        def learn(weight, before, image, gradient, slope):
            gradients.append(gradient)
            if len(gradients) == self.steps:
                gradients.append(ops.zeros_like(image) if slope is None else slope)

        run = self._run(objective, x, state, learn)
        start = tuple(s[rows] for s in state[: 1 + self.latent])
        count = ops.cast(ops.shape(start[0])[0], x.dtype)
        return run, lambda: (self._replay(x[rows], start, gradients) / count, None)

    def describe(self):
        facts = super().describe()
        return {**facts, "maximizer": self.maximizer.describe()}

    @classmethod
    def from_config(cls, config):
        maximizer = config["maximizer"]
        if isinstance(maximizer, dict):
            maximizer = keras.saving.deserialize_keras_object(maximizer)
        return cls(**{**config, "maximizer": maximizer})


def _joined(image, states):
    """The images that ``phi`` learns from, and the others' last ones."""
    return image if len(states) == 1 else ops.concatenate([image, states[1][0]])


def _normalized(rule, steps):
    """``w_1 .. w_T`` with sum 1."""
    if isinstance(rule, str):
        one_of("step_weights", rule, STEP_WEIGHTS)
        numbers = {
            "linear": range(1, steps + 1),
            "uniform": [1] * steps,
            "last": [0] * (steps - 1) + [1],
        }[rule]
    else:
        numbers = [
            non_negative("step_weights", w)
            for w in (rule if isinstance(rule, list | tuple) else ())
        ]
        if len(numbers) != steps or not sum(numbers):
            raise UserError(
                f"step_weights must be {', '.join(STEP_WEIGHTS)} or {steps} numbers >= 0, not all "
                f"zero. Received: {rule!r}."
            )
    return [number / sum(numbers) for number in numbers]
