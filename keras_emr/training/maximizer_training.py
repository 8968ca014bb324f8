"""Training a learned maximizer: phi's side of :class:`RobustClassifier`."""

from __future__ import annotations

import keras
from keras import ops

from keras_emr import backend, losses
from keras_emr.backend import replicas
from keras_emr.errors import UserError
from keras_emr.network import Network
from keras_emr.sampling import VALIDATION_SEED, StreamSampler
from keras_emr.training.meta_update import ascend

MAXIMIZER_UPDATES = ("joint", "alternating", "frozen")


class _Count(keras.metrics.Sum):
    """A sum to which every replica adds the same: the first one's is the result."""

    def add_variable(self, *args, **kwargs):
        return super().add_variable(*args, **{**kwargs, "aggregation": "only_first_replica"})


class MaximizerTraining:
    """What a classifier does with a maximizer: train it with the defense, alone, or judge it."""

    def _make_maximizer_metrics(self):
        mean = keras.metrics.Mean
        self.inner_loss_metric = mean(name="inner_loss")
        self.skipped_metric = _Count(name="skipped_updates")
        self.learned_loss_metric = mean(name="learned_loss")
        self.referee_loss_metric = mean(name="referee_loss")

    def _absent_maximizer_logs(self, training):
        """Names of the metrics above that a step of this kind does not touch."""
        absent = ()
        if self.maximizer is not None:
            if training or self._learns is None:
                absent += ("learned_loss", "referee_loss")
            if not training or self._learns != "joint":
                absent += ("inner_loss", "skipped_updates")
        return absent

    def _build_maximizer(self, input_shape):
        if not self.maximizer.built:
            self.maximizer.build(input_shape)
        self.maximizer.trainable = False
        if self._learns:
            self.maximizer.trained_for = {
                "epsilon": self.attack.epsilon,
                "channels": input_shape[-1],
                "steps": self.attack.steps,
                "latent": self.attack.latent,
            }
        self._build_maximizer_optimizer()

    def _build_maximizer_optimizer(self):
        if self.maximizer_optimizer is not None and self.maximizer.built:
            self.maximizer_optimizer.build(self.maximizer.variables)

    @property
    def _learns(self):
        """How phi is trained: ``joint``, ``alternating`` or ``None``."""
        attacked = self.maximizer is not None and self.defense.needs_adversarial
        return self.maximizer_update if attacked and self.maximizer_update != "frozen" else None

    def fit_maximizer(self, x=None, y=None, batch_size=None, epochs=1, **kwargs):
        """Train phi alone against the classifier as it is (a warm-up, or a frozen classifier).

        Args as ``keras.Model.fit``; logs ``inner_loss`` and ``skipped_updates``.
        """
        if self._learns is None:
            raise UserError(
                "there is no maximizer to train. Received: "
                f"attack={self.attack and self.attack.name!r}, "
                f"maximizer_update={self.maximizer_update!r}. Expected a LearnedAttack, joint or "
                "alternating."
            )
        self._build_for(x)
        self._maximizer_alone, self.train_function = True, None
        callbacks = [*kwargs.pop("callbacks", ())]
        if hasattr(x, "set_epoch"):
            order = keras.callbacks.LambdaCallback(on_epoch_begin=lambda i, _: x.set_epoch(i))
            callbacks.append(order)
        try:
            with backend.preserve_random_state():
                return super().fit(x, y, batch_size, epochs, callbacks=callbacks, **kwargs)
        finally:
            self._maximizer_alone, self.train_function = False, None

    def train_maximizer(self, network, x, y):
        """Attack a batch with the learned maximizer and update phi; returns the images."""
        attack = self.training_attack
        objective = self._objective(network, attack, x, y, training=True)
        drawn = attack.draw(x, StreamSampler(self.attack_seed), self._classes(network, attack))
        x_adv, value, gradients = attack.meta_gradient(objective, x, drawn)
        share = replicas.fraction(ops.shape(x)[0])
        if share is not None:  # from means over own rows to the mean over all
            gradients = replicas.total([g * ops.cast(share, g.dtype) for g in gradients])
        skipped = ascend(self.maximizer_optimizer, gradients, self.maximizer.variables)
        self.inner_loss_metric.update_state(replicas.gather(value))
        self.skipped_metric.update_state(skipped)
        return x_adv

    def _judge_maximizer(self, network, x, y, adversarial, sample_weight):
        """Cross-entropy under the learned attack, and at the referee's ``adversarial`` logits.

        ``x`` and ``y`` are a replica's rows, the others those of the global batch.
        """
        if self._learns is None:
            return
        objective = self._objective(network, self.attack, x, y, training=False)
        sampler = StreamSampler(VALIDATION_SEED)
        found = self.attack(objective, x, sampler, self._classes(network, self.attack))
        y, learned = replicas.gather(y), replicas.gather(network.constant()(found))
        self.learned_loss_metric.update_state(losses.cross_entropy(y, learned), sample_weight)
        self.referee_loss_metric.update_state(losses.cross_entropy(y, adversarial), sample_weight)

    def maximizer_step(self, x, y):
        """A batch's update of phi alone; returns its metric results."""
        x, y = self._as_batch(x, y)
        self.train_maximizer(Network(self.model), x, y)
        return {m.name: m.result() for m in (self.inner_loss_metric, self.skipped_metric)}
