"""What attacks, defenses, regularizers and schedules have in common: options that are saved."""

from __future__ import annotations

import inspect

import keras

from keras_emr.errors import UserError


def register(cls):
    """Make a part loadable from saved models."""
    return keras.saving.register_keras_serializable("keras_emr")(cls)


class Part:
    """Something made from options alone, each kept under its argument's name."""

    @classmethod
    def option_names(cls):
        return [
            name for name in inspect.signature(cls).parameters if name not in ("args", "kwargs")
        ]

    def get_config(self):
        return {name: getattr(self, name) for name in self.option_names()}

    @classmethod
    def from_config(cls, config):
        return cls(**config)

    def __repr__(self):
        options = ", ".join(f"{name}={value!r}" for name, value in self.get_config().items())
        return f"{type(self).__name__}({options})"


def non_negative(field, value):
    """``value`` as a float. Raises :class:`UserError` unless it is a finite number >= 0."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise UserError(f"{field} must be a number >= 0. Received: {value!r}.")
    if not 0 <= value < float("inf"):
        raise UserError(f"{field} must be a number >= 0. Received: {value!r}.")
    return float(value)


def one_of(field, value, known):
    """``value``. Raises :class:`UserError` unless it is among ``known``."""
    if value not in known:
        names = ", ".join(str(k) for k in known if k is not None)
        raise UserError(f"unknown {field}. Received: {value!r}. Expected one of: {names}.")
    return value


def whole(field, value, low):
    """``value``. Raises :class:`UserError` unless it is a whole number >= ``low``."""
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise UserError(f"{field} must be a whole number >= {low}. Received: {value!r}.")
    return value
