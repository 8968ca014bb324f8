"""What some defenses need beside the network: a teacher, margins, a perturbation that persists."""

from __future__ import annotations

import keras
from keras import ops

from keras_emr import distribution, losses
from keras_emr.attacks import boundary_search
from keras_emr.attacks.pgd import PGD
from keras_emr.backend import clip
from keras_emr.errors import UserError
from keras_emr.sampling import StreamSampler

_SHARE_OBJECTIVES = (None, "cross_entropy", "kl")


class Companions:
    """The part of a classifier that keeps them; all are weights of its own, saved with it."""

    def _make_companions(self, teacher, weight_perturbation):
        defense = self.defense
        self.teacher = None
        self.perturbation = self.remembered = None
        if defense.needs_teacher:
            self.teacher = _copy(self.model) if teacher is None else teacher
            self.teacher_accuracy_metric = keras.metrics.Mean(name="teacher_accuracy")
        elif teacher is not None:
            raise UserError(
                f"defense {defense.name!r} has no teacher. Received: teacher={teacher.name!r}. Use "
                "defense lbgat."
            )
        special = defense.needs_teacher or defense.needs_margins or defense.replays > 1
        if special and weight_perturbation is not None:
            raise UserError(
                f"AWP is not defined for defense {defense.name!r}. Received: weight_perturbation="
                f"{weight_perturbation!r}. Use at, trades, mart or mail."
            )
        group = distribution.current()
        if special and group is not None and len(group.devices) > 1:
            raise UserError(
                f"defense {defense.name!r} keeps state that devices do not share. Received: "
                f"{len(group.devices)} devices. Use one, or at, trades, mart or mail."
            )
        if defense.needs_margins:
            if not isinstance(self.attack, PGD):
                raise UserError(
                    f"defense {defense.name!r} searches along PGD's direction. Received: attack="
                    f"{self.attack.name!r}. Use keras_emr.PGD(epsilon), epsilon the margin wanted."
                )
            self.margin_metric = keras.metrics.Mean(name="margin")
        if self.persists and self.attack.norm != "linf":
            raise UserError(
                f"defense {defense.name!r} is one of Linf. Received: norm={self.attack.norm!r}."
            )

    @property
    def persists(self):
        """Whether a perturbation lives on from batch to batch."""
        return hasattr(self.defense, "ascend")

    def _build_companions(self, input_shape):
        fixed = {"initializer": "zeros", "trainable": False, "dtype": "float32"}
        if self.teacher is not None and not self.teacher.built:
            self.teacher(keras.KerasTensor((None, *input_shape[1:])))
        if self.persists and self.perturbation is None:
            shape = (self.defense.batch_size, *input_shape[1:])
            self.perturbation = self.add_weight(shape=shape, name="perturbation", **fixed)
        if self.defense.needs_margins and self.defense.examples and self.remembered is None:
            shape = (self.defense.examples,)
            self.remembered = self.add_weight(shape=shape, name="remembered", **fixed)

    def require_shares(self):
        """Raise :class:`UserError` if images cannot be mixed for this classifier."""
        if not self.defense.takes_shares:
            raise UserError(
                "mixup and cutmix give every class a share of an image, for which this loss is not "
                f"defined. Received: defense={self.defense.name!r}. Use standard, at, trades, lbgat"
                " or free-at, without a logit margin."
            )
        objective = self.attack and self.attack.objective
        if objective not in _SHARE_OBJECTIVES:
            raise UserError(
                "mixup and cutmix give every class a share of an image, for which this objective "
                f"is not defined. Received: objective={objective!r}. Use cross_entropy or kl."
            )

    # LBGAT

    def teach(self, x, y, training):
        """The teacher's logits at the clean images."""
        logits = self.teacher(x, training=training)
        self.teacher_accuracy_metric.update_state(losses.correct(y, ops.stop_gradient(logits)))
        return logits

    # MMA

    def find_boundary(self, network, x, y, number):
        """Images near the decision boundary, and which of them count in the loss.

        Args:
            number: (N,) which training examples they are, or ``None``.

        Returns:
            ``(x_adv, counted)``: images, those of misclassified examples unchanged, and (N,) 0 or
            1; detached.
        """
        attack, defense = self.training_attack, self.defense
        objective = self._objective(network, attack, x, y, training=True)
        wanted, smallest = attack.epsilon, defense.smallest
        smallest = 0.1 * wanted if smallest is None else smallest
        known = self.remembered is not None and number is not None
        nothing = ops.cast(ops.zeros_like(y), x.dtype)
        radius = nothing + wanted
        if known:
            radius = ops.maximum(ops.take(self.remembered.value, number), smallest + nothing)
        right = objective.value(x) < 0
        found, margin = boundary_search.search(
            attack,
            objective,
            x,
            StreamSampler(self.attack_seed),
            radius,
            boundary_search.REACH * wanted,
            defense.trials,
        )
        margin = ops.where(right, margin, nothing)
        if known:
            places = ops.expand_dims(number, -1)
            self.remembered.assign(ops.scatter_update(self.remembered.value, places, margin))
        self.margin_metric.update_state(margin)
        x_adv = ops.where(ops.reshape(right, (-1, 1, 1, 1)), found, x)
        return ops.stop_gradient(x_adv), ops.stop_gradient(ops.cast(margin < wanted, x.dtype))

    # free-AT: the step of each backend calls these around its one backward pass.

    def perturbation_of(self, x):
        """The persisting perturbation of a batch, or ``None``."""
        if not self.persists:
            return None
        return ops.stop_gradient(self.perturbation.value[: ops.shape(x)[0]])

    @staticmethod
    def perturbed(x, perturbation):
        """The images that are trained on; differentiable in ``perturbation``."""
        return clip(ops.cast(x, keras.config.floatx()) + perturbation, 0.0, 1.0)

    def persist(self, perturbation, gradient):
        """Let the perturbation ascend, and keep it."""
        moved = self.defense.ascend(perturbation, gradient, self.training_attack.epsilon)
        rest = self.perturbation.value[ops.shape(moved)[0] :]
        self.perturbation.assign(ops.concatenate([moved, rest], axis=0))


def _copy(model):
    """A network as ``model``, with weights of its own."""
    try:
        return keras.models.clone_model(model)
    except Exception as error:  # a subclassed model can fail in any way
        raise UserError(
            f"cannot copy the network for a teacher: {str(error).splitlines()[0]} Received: model "
            f"{model.name!r}. Give teacher=, a keras.Model to logits."
        ) from None
