"""What a defense is: the outer loss, and what its attack maximises."""

from __future__ import annotations

from keras_emr.errors import UserError
from keras_emr.part import Part, non_negative


class Defense(Part):
    """A training method: per-example outer loss from the logits at ``x`` and at ``x_adv``.

    Class attributes a subclass sets:

    * ``name``: as on the command line;
    * ``needs_clean``, ``needs_adversarial``: which logits the loss reads;
    * ``attack_defaults``: options of the attack that the method prescribes and that its user left
      at ``None``: ``objective``, ``start`` and so on;
    * ``takes_shares``: whether ``y`` may be the classes' shares (N, K) of mixed images;
    * ``needs_teacher``, ``needs_margins``: whether the loss takes ``teacher``, the (N, K) logits of
      a second network at the clean images, or ``counted``, see :class:`MMA`;
    * ``replays``: steps in a row on the same batch, see :class:`FreeAdversarialTraining`.
    """

    name = "defense"
    needs_clean = False
    needs_adversarial = True
    attack_defaults = {"objective": "cross_entropy", "start": "uniform"}
    takes_shares = False
    needs_teacher = False
    needs_margins = False
    replays = 1

    def loss(self, y, clean, adversarial, epoch):
        """Per-example loss.

        Args:
            y: (N,) integer labels, or (N, K) shares where the method takes them.
            clean: (N, K) logits at the clean images, or ``None`` if not needed.
            adversarial: (N, K) logits at the adversarial images, or ``None`` if not needed.
            epoch: integer scalar, 0-based.

        Returns:
            (N,) losses, float32 or wider.
        """
        raise NotImplementedError


def smoothing(value):
    """``value`` as a share of label smoothing. Raises :class:`UserError` unless in [0, 1)."""
    if non_negative("label_smoothing", value) >= 1:
        raise UserError(f"label_smoothing must be below 1. Received: {value!r}.")
    return float(value)
