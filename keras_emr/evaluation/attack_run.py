"""One model under one attack: compiled single steps, repeated from the host."""

from __future__ import annotations

from keras import ops

from keras_emr import backend, losses
from keras_emr.attacks.base import Objective
from keras_emr.evaluation.batching import in_batches, padded
from keras_emr.network import Network
from keras_emr.sampling import ExampleSampler

# Steps between two looks at which examples are finished: each waits for the device.
_LOOK = 5


class AttackRun:
    """One model and attack, compiled once: a single step, repeated from the host.

    Compile time then does not grow with the number of steps; the images stay on the device. What
    is never called is never compiled.

    Args:
        model: Keras classifier to logits.
        attack: its ``objective`` left at ``None`` means cross-entropy.
        batch_size: images at a time; shorter batches are padded (:func:`padded`).
    """

    def __init__(self, model, attack, batch_size):
        self.attack = attack
        self.batch_size = batch_size
        self.network = Network(model)
        self._random, self._steps = bool(self.network.seed_states), 0
        self._predict = backend.compiled(self._judge, model.variables)
        variables = [*model.variables, *attack.variables]
        self._begin = backend.compiled(self._first, variables)
        self._step = backend.compiled(self._advance, variables)
        self._loss = backend.compiled(self._final_loss, model.variables)

    def _objective(self, x, y, noise=None):
        passes = getattr(self.attack, "eot", 1)

        def logits(x, i=0):
            fresh = None if noise is None else noise * passes + i
            return self.network.frozen(noise=fresh)(x)

        name = self.attack.objective or "cross_entropy"
        return Objective(logits, name, x, y, passes=passes)

    def _judge(self, x, y):
        logits = self.network.frozen()(x)
        return losses.correct(y, logits), ops.all(ops.isfinite(logits), axis=-1)

    def _first(self, x, y, drawn, *noise):
        return self.attack.begin(self._objective(x, y, *noise), x, drawn)

    def _advance(self, x, y, state, *noise):
        return self.attack.step(self._objective(x, y, *noise), x, state)

    def _noise(self):
        """Nothing, or, for a model with random layers, the number of the step as a tensor."""
        if not self._random:
            return ()
        self._steps += 1
        return (ops.convert_to_tensor(self._steps, dtype="int32"),)

    def _final_loss(self, x, y, x_adv):
        objective = self._objective(x, y)
        return objective.loss(objective.logits(x_adv))

    def judge(self, x, y):
        """Which examples are right, and whose logits are finite: two (N,) bool."""
        return in_batches(self._predict, self.batch_size, x, y)

    def prepare(self, x, y, index, restart, seed, size=None):
        """Tensors of one padded batch, ``(x, y, drawn)``: images, labels and random numbers.

        Args:
            x, y: NumPy arrays of at most ``batch_size`` rows.
            index: their indices in the data set, which decide the random numbers.
            restart, seed: int.
            size: rows to pad to; ``None``: ``batch_size``.
        """
        size = self.batch_size if size is None else size
        sampler = ExampleSampler(seed, restart, padded(index, size))
        x, y = (ops.convert_to_tensor(padded(a, size)) for a in (x, y))
        return x, y, self.attack.draw(x, sampler, self.network.classes)

    def states(self, x, y, drawn, steps=None):
        """The attack's state before the first step and after each, one by one.

        Args:
            x, y, drawn: of :meth:`prepare`.
            steps: how many; ``None``: the attack's own number.
        """
        state = self._begin(x, y, drawn, *self._noise())
        yield state
        for _ in range(self.attack.steps if steps is None else steps):
            state = self._step(x, y, state, *self._noise())
            yield state

    def attack_batch(self, x, y, index, restart, seed, tick=None, size=None):
        """Adversarial images and the objective (N,) at them, as NumPy arrays.

        Arguments as of :meth:`prepare`. ``tick`` is called after every step with the share done,
        and may raise.
        """
        rows = len(x)
        x, y, drawn = self.prepare(x, y, index, restart, seed, size)
        for i, state in enumerate(self.states(x, y, drawn)):
            if tick:
                tick(i / self.attack.steps)
            if i % _LOOK == 0 and self._all_finished(state):
                break
        found = self.attack.result(state)
        loss = self._loss(x, y, found)
        return ops.convert_to_numpy(found)[:rows], ops.convert_to_numpy(loss)[:rows]

    def _all_finished(self, state):
        finished = self.attack.finished(state)
        return finished is not None and bool(ops.convert_to_numpy(ops.all(finished)))
