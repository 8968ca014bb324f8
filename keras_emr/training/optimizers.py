"""Optimizers with the weight decay of the published recipes, and a choice of what it decays."""

from __future__ import annotations

import keras
from keras import ops

from keras_emr.part import non_negative, one_of, register

DECAYED = ("all", "kernels")


def decays(variable, decayed):
    """Whether weight decay touches ``variable``: ``kernels`` have more than one axis."""
    return decayed == "all" or len(variable.shape) > 1


@register
class SGD(keras.optimizers.Optimizer):
    """Stochastic gradient descent with L2 decay inside the momentum, as the recipes' code has it.

    ``d = g + weight_decay w``, ``v <- momentum v + d``, ``w <- w - rate v`` (Nesterov:
    ``w <- w - rate (d + momentum v)``). Keras's own SGD decays outside the momentum, with momentum
    0.9 ten times more weakly, and keeps the rate inside ``v``, so that a drop takes effect only
    after some steps.

    Args:
        learning_rate: number or schedule.
        momentum: in [0, 1].
        nesterov: look ahead.
        weight_decay: factor of the L2 decay; 0: none.
        decayed: ``all``: BatchNorm and biases too, as TRADES, MART, MAIL and EMR do; ``kernels``:
            only variables with more than one axis.
        kwargs: of ``keras.optimizers.Optimizer``: ``global_clipnorm`` and so on. Gradients are
            clipped before decay is added.
    """

    def __init__(
        self,
        learning_rate=0.1,
        momentum=0.9,
        nesterov=False,
        weight_decay=0.0,
        decayed="all",
        name="sgd",
        **kwargs,
    ):
        super().__init__(learning_rate=learning_rate, name=name, **kwargs)
        self.momentum = non_negative("momentum", momentum)
        self.nesterov = bool(nesterov)
        self.l2 = non_negative("weight_decay", weight_decay)
        self.decayed = one_of("decayed", decayed, DECAYED)

    def build(self, variables):
        if not self.built:
            super().build(variables)
            self.velocities = self.add_optimizer_variables(variables, "velocity")

    def update_step(self, gradient, variable, learning_rate):
        # On TensorFlow the variable is TensorFlow's own: operations, not its methods.
        rate = ops.cast(learning_rate, variable.dtype)
        gradient = ops.cast(gradient, variable.dtype)
        if self.l2 and decays(variable, self.decayed):
            gradient = gradient + ops.multiply(variable, self.l2)
        velocity = self.velocities[self._get_variable_index(variable)]
        speed = ops.multiply(ops.cast(velocity, variable.dtype), self.momentum) + gradient
        self.assign(velocity, speed)
        step = gradient + self.momentum * speed if self.nesterov else speed
        self.assign_sub(variable, rate * step)

    def get_config(self):
        return {
            **super().get_config(),
            "momentum": self.momentum,
            "nesterov": self.nesterov,
            "weight_decay": self.l2,
            "decayed": self.decayed,
        }


@register
class AdamW(keras.optimizers.AdamW):
    """Keras's AdamW (decoupled decay), with a choice of what it decays.

    Args:
        decayed: ``all`` or ``kernels``, see :class:`SGD`.
        kwargs: of ``keras.optimizers.AdamW``.
    """

    def __init__(self, learning_rate=0.001, decayed="all", **kwargs):
        super().__init__(learning_rate=learning_rate, **kwargs)
        self.decayed = one_of("decayed", decayed, DECAYED)

    def build(self, variables):
        if not self.built:
            spared = [v for v in variables if not decays(v, self.decayed)]
            self.exclude_from_weight_decay(var_list=spared)
        super().build(variables)

    def get_config(self):
        return {**super().get_config(), "decayed": self.decayed}
