"""What a defense is: the outer loss, and what its attack maximises."""

from __future__ import annotations

import inspect

from keras_emr.errors import UserError


class Defense:
    """A training method: per-example outer loss from the logits at ``x`` and at ``x_adv``.

    Class attributes a subclass sets:

    * ``name``: as on the command line;
    * ``needs_clean``, ``needs_adversarial``: which logits the loss reads;
    * ``attack_defaults``: options of the attack that the method prescribes and that its user left
      at ``None``: ``objective``, ``start`` and so on.
    """

    name = "defense"
    needs_clean = False
    needs_adversarial = True
    attack_defaults = {"objective": "cross_entropy", "start": "uniform"}

    def loss(self, y, clean, adversarial, epoch):
        """Per-example loss.

        Args:
            y: (N,) integer labels.
            clean: (N, K) logits at the clean images, or ``None`` if not needed.
            adversarial: (N, K) logits at the adversarial images, or ``None`` if not needed.
            epoch: integer scalar, 0-based.

        Returns:
            (N,) losses, float32 or wider.
        """
        raise NotImplementedError

    def get_config(self):
        names = inspect.signature(type(self).__init__).parameters
        return {
            name: getattr(self, name) for name in names if name not in ("self", "args", "kwargs")
        }

    @classmethod
    def from_config(cls, config):
        return cls(**config)

    def __repr__(self):
        options = ", ".join(f"{k}={v!r}" for k, v in self.get_config().items())
        return f"{type(self).__name__}({options})"


def non_negative(field, value):
    """``value`` as a float. Raises :class:`UserError` unless it is a finite number >= 0."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1e300:
        raise UserError(f"{field} must be a number >= 0. Received: {value!r}.")
    return float(value)
