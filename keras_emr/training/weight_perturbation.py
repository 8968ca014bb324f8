"""Adversarial weight perturbation (Wu et al., NeurIPS 2020)."""

from __future__ import annotations

from keras import ops

from keras_emr import backend
from keras_emr.backend import replicas
from keras_emr.network import Network
from keras_emr.part import Part, non_negative, register, whole
from keras_emr.training.averaging import constrained

_TINY = 1e-20


@register
class AWP(Part):
    """Train at weights moved by ``gamma`` of their own length up the loss: "AWP".

    For every variable ``W`` with more than one axis, ``g`` the gradient of the defense's loss at
    the adversarial images (BatchNorm in training mode, its moving statistics left alone):

        ``v = ||W||_F / (||g||_F + 1e-20) g``,  loss and optimizer step at ``W + gamma v``,

    then ``gamma v`` is taken away again. So weight decay acts on the moved weights, and BatchNorm
    sees them, as in the authors' code. The attack is made at ``W``; regularizers act at
    ``W + gamma v`` and take no part in ``g``.

    Args:
        gamma: >= 0; the authors use 0.01 for AT, 0.005 for TRADES.
        warmup: epochs without it at the start (0 for AT, 10 for TRADES).
    """

    def __init__(self, gamma=0.01, warmup=0):
        self.gamma = non_negative("gamma", gamma)
        self.warmup = whole("warm-up epochs", warmup, 0)

    def offsets(self, gradients, weights, epoch):
        """``gamma v`` for each of ``weights``, zeros where it has one axis at most."""
        gamma = self.gamma * ops.cast(epoch >= self.warmup, "float32")
        return [
            gamma * _length(w) / (_length(g) + _TINY) * g if len(w.shape) > 1 else ops.zeros_like(w)
            for g, w in zip(gradients, weights, strict=True)
        ]


def _length(w):
    return ops.sqrt(ops.sum(ops.square(w)))


class WeightPerturbation:
    """The part of a step that comes before the loss when weights are perturbed."""

    def perturb(self, x, y, sample_weight):
        """Attack a batch, and find where the weights go for its loss.

        Returns:
            ``(x_adv, offsets)``: images, and a tensor for each trainable variable; detached.
        """
        x, y = self._as_batch(x, y)
        epoch = ops.maximum(self.epoch.value, 0)
        network = Network(self.model)
        x_adv = self.find_adversarial(network, x, y, training=True)
        labels, shares = replicas.gather(y), replicas.gather(sample_weight)

        def loss(values):
            logits = network.at(values, training=True)
            clean = replicas.gather(logits(x)) if self.defense.needs_clean else None
            attacked = replicas.gather(logits(x_adv))
            per_example = self.defense.loss(labels, clean, attacked, epoch)
            return self.mean_over_batch(labels, per_example, shares), ()

        weights = [
            ops.stop_gradient(ops.convert_to_tensor(v)) for v in self.model.trainable_variables
        ]
        _, gradients = backend.gradient(loss, weights)
        gradients = replicas.total(gradients)
        offsets = self.weight_perturbation.offsets(gradients, weights, epoch)
        return x_adv, [ops.stop_gradient(offset) for offset in offsets]

    def move_weights(self, offsets, sign):
        """Add ``sign`` times the offsets to the trainable variables."""
        for variable, offset in zip(self.model.trainable_variables, offsets, strict=True):
            moved = variable.value + sign * offset
            variable.assign(moved if sign > 0 else constrained(variable, moved))

    def restored(self, weights, offsets):
        """The values of the trainable variables without the offsets."""
        triples = zip(self.model.trainable_variables, weights, offsets, strict=True)
        return [constrained(variable, w - offset) for variable, w, offset in triples]
