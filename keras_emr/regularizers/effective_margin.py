"""Effective margin regularization (Liu & Chan, BMVC 2022, arXiv 2210.05118).

For a piecewise-linear network ``z_k(x) = w_k(x)^T x + b_k(x)``: ``w_k``, the input gradient of
logit k, is the effective weight, and the logit margin divided by ``||w_y - w_j||`` the effective
margin. Cross-entropy can always be lowered by scaling the logits, which leaves every effective
margin as it was; penalising the effective weight norm takes that way out. Implements the
regularizer as in the authors' released code; the paper's tables were not available to us, so no
reproduction of its numbers is claimed.
"""

from __future__ import annotations

import keras
from keras import ops

from keras_emr import backend
from keras_emr.errors import UserError
from keras_emr.geometry import norm as norm_of
from keras_emr.geometry import per_example
from keras_emr.losses import widen
from keras_emr.part import Part, non_negative, one_of, register
from keras_emr.regularizers.presets import preset_options
from keras_emr.regularizers.weighting import RULES, combine, cotangents

_CHOICES = {
    "weighting": tuple(RULES),
    "norm": ("l2", "l1", "linf"),
    "power": (2, 1),
    "reduction": ("mean", "released"),
    "at": (None, "adversarial", "clean", "both"),
    "bn_mode": ("inference", "batch"),
    "estimator": ("double_backprop", "finite_difference"),
}


@register
class EffectiveMarginRegularizer(Part):
    """EMR: adds ``weight * mean_i || sum_k c_ik w_k(x_i) ||^2`` to the loss.

    Images are taken in [0, 1] units: differentiate with respect to raw pixels, normalisation is
    a layer of the model.

    Args:
        weight: lambda, >= 0. With 0 the regularizer is not computed at all.
        weighting: the class weights ``c``, always detached: ``softmax`` (of ``z / temperature``,
            the release), ``predicted``, ``true``, ``sampled`` (one class, drawn from the softmax),
            ``uniform``, ``runner_up_difference`` (``e_y - e_j``: the effective margin's
            denominator), ``rademacher``, ``sphere`` (both estimate the squared Frobenius norm of
            the Jacobian), ``exact`` (that norm itself; K backward passes).
        temperature: of ``softmax`` and ``sampled``.
        center: subtract the mean of ``c`` over the classes, which ignores what is common to all
            logits and changes no prediction (Cross-Lipschitz).
        norm: of the input gradient: ``l2``, ``l1`` (dual of Linf) or ``linf``.
        power: 2 (squared) or 1.
        reduction: ``mean`` over the batch, or ``released``: that divided by the batch size, as
            the release's code reduces.
        at: ``adversarial``, ``clean`` or ``both`` (their mean); ``None``: adversarial where the
            defense attacks, else clean.
        bn_mode: ``inference`` statistics, or ``batch``.
        estimator: ``double_backprop`` (exact), or ``finite_difference`` along the dual direction
            of the gradient, which needs no second derivative.
        step: ``h`` of the finite difference.
        central: central instead of forward difference.
        schedule: callable ``epoch -> multiplier`` (``StepDecay``, ``WarmUp``), or ``None``.

    Source: arXiv 2210.05118 and the authors' code; see the module's docstring.
    """

    name = "emr"

    def __init__(
        self,
        weight=0.01,
        weighting="softmax",
        temperature=1.0,
        center=False,
        norm="l2",
        power=2,
        reduction="mean",
        at=None,
        bn_mode="inference",
        estimator="double_backprop",
        step=1e-2,
        central=False,
        schedule=None,
    ):
        given = locals()
        for field, known in _CHOICES.items():
            setattr(self, field, one_of(f"EMR {field}", given[field], known))
        for field, value in (("temperature", temperature), ("step", step)):
            if not isinstance(value, (int, float)) or not 0 < value < float("inf"):
                raise UserError(f"EMR {field} must be a number > 0. Received: {value!r}.")
        self.weight = non_negative("EMR weight", weight)
        self.temperature = float(temperature)
        self.center = bool(center)
        self.step = float(step)
        self.central = bool(central)
        self.schedule = schedule

    @classmethod
    def preset(cls, name, **changes):
        """The regularizer of one of the authors' released recipes, e.g. ``trades-emr-released``.

        Args:
            name: a key of :data:`keras_emr.regularizers.presets.PRESETS`.
            changes: options that differ from the preset.
        """
        return cls(**{**preset_options(name), **changes})

    def scale(self, epoch, batch_size):
        """What the mean penalty is multiplied by in epoch ``epoch`` (0-based)."""
        scale = self.weight if self.schedule is None else self.weight * self.schedule(epoch)
        return scale / ops.cast(batch_size, "float32") if self.reduction == "released" else scale

    def __call__(self, network, x, x_adv, y, sampler):
        """Unweighted per-example penalty.

        Args:
            network: :class:`keras_emr.network.Network`.
            x: (N, H, W, C) clean images in [0, 1].
            x_adv: adversarial images, or ``None``.
            y: (N,) integer labels.
            sampler: source of random numbers for the random weightings.

        Returns:
            (N,) penalties, float32 or wider; gradients reach the weights of the model only.
        """
        images = {"clean": x, "adversarial": x_adv}
        points = [images[point] for point in self._points(x_adv is not None)]
        return sum(self._penalty(network, p, y, sampler) for p in points) / len(points)

    def _points(self, attacked):
        if self.at == "both":
            return ("clean", "adversarial")
        return (self.at or ("adversarial" if attacked else "clean"),)

    def slopes_at(self, attacked):
        """Of which images, ``clean`` and ``adversarial``, it asks :meth:`Network.vjp`.

        ``attacked``: whether there are adversarial images.
        """
        alike = self.estimator == "double_backprop" and self.bn_mode == "inference"
        return self._points(attacked) if alike else ()

    def _penalty(self, network, x, y, sampler):
        training = self.bn_mode == "batch"
        if self.estimator == "finite_difference":
            norms = self._finite_differences(network, x, y, sampler, training)
        else:
            logits, pullback = network.vjp(x, training)
            pairs = cotangents(self.weighting, logits, y, self.temperature, self.center, sampler)
            norms = [(self._powered_norm(pullback(c)), factor) for c, factor in pairs]
        return sum(norm * factor for norm, factor in norms)

    def _powered_norm(self, gradient):
        if self.norm == "l2":
            axes = tuple(range(1, len(gradient.shape)))
            squared = ops.sum(ops.square(gradient), axis=axes)
            # The constant keeps the root's derivative finite at zero.
            return squared if self.power == 2 else ops.sqrt(squared + 1e-12)
        size = norm_of(gradient, self.norm)
        return ops.square(size) if self.power == 2 else size

    def _finite_differences(self, network, x, y, sampler, training):
        """``((c.z(x + h d) - c.z(x)) / h)^power``, ``d`` the direction that attains the norm."""
        x = ops.stop_gradient(x)
        live, frozen = network.live(training), network.frozen(training)
        here = widen(live(x))
        pairs = cotangents(self.weighting, here, y, self.temperature, self.center, sampler)
        results = []
        for c, factor in pairs:

            def value(x, c=c):
                return combine(c, widen(frozen(x))), ()

            direction = self._dual_direction(backend.value_and_grad(value, x)[2])
            ahead = combine(c, widen(live(x + self.step * direction)))
            if self.central:
                behind = combine(c, widen(live(x - self.step * direction)))
                slope = (ahead - behind) / (2 * self.step)
            else:
                slope = (ahead - combine(c, here)) / self.step
            results.append((ops.square(slope) if self.power == 2 else ops.abs(slope), factor))
        return results

    def _dual_direction(self, gradient):
        """The unit direction (in the dual norm) along which the slope is ``||gradient||``."""
        if self.norm == "l2":
            length = per_example(norm_of(gradient, "l2"), gradient)
            direction = ops.where(length > 0, gradient / ops.maximum(length, 1e-30), 0.0)
        elif self.norm == "l1":
            direction = ops.sign(gradient)
        else:
            flat = ops.reshape(gradient, (ops.shape(gradient)[0], -1))
            peak = ops.one_hot(ops.argmax(ops.abs(flat), axis=-1), flat.shape[-1], dtype=flat.dtype)
            direction = ops.reshape(peak * ops.sign(flat), ops.shape(gradient))
        return ops.stop_gradient(direction)

    def check(self, model, attacked):
        """Raise :class:`UserError` if this penalty cannot be computed for ``model``.

        ``attacked``: whether training has adversarial images at all. On TensorFlow a bilinear
        resize silently drops out of the second derivative, and the others have none.
        """
        if self.at in ("adversarial", "both") and not attacked:
            raise UserError(
                f"EMR at={self.at!r} needs adversarial images. Received: a defense without an "
                "attack. Use at='clean'."
            )
        if backend.NAME != "tensorflow" or self.estimator != "double_backprop":
            return
        for layer in model._flatten_layers():
            resizes = isinstance(layer, keras.layers.Resizing) or (
                isinstance(layer, keras.layers.UpSampling2D) and layer.interpolation != "nearest"
            )
            if resizes:
                raise UserError(
                    "EMR's second derivative is wrong through a resizing layer on the tensorflow "
                    f"backend. Received: layer {layer.name!r} ({type(layer).__name__}). Use "
                    "estimator='finite_difference', or the jax backend."
                )

    def get_config(self):
        return {
            **super().get_config(),
            "schedule": keras.saving.serialize_keras_object(self.schedule),
        }

    @classmethod
    def from_config(cls, config):
        schedule = keras.saving.deserialize_keras_object(config["schedule"])
        return cls(**{**config, "schedule": schedule})
