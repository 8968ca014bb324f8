"""Look a part up by its name on the command line."""

from __future__ import annotations

import importlib

from keras_emr.errors import unknown


class Registry:
    """Named parts of one kind, imported on first use.

    Args:
        kind: what the parts are called in messages, e.g. ``defense``.
        homes: name -> ``module:attribute``.
    """

    def __init__(self, kind: str, homes: dict[str, str]):
        self.kind = kind
        self.homes = homes

    @property
    def names(self) -> list[str]:
        return list(self.homes)

    def load_all(self) -> None:
        """Import every part."""
        for name in self.homes:
            self.get(name)

    def get(self, name: str):
        """The part called ``name``. Raises :class:`UserError` for an unknown one."""
        if name not in self.homes:
            raise unknown(self.kind, name, self.homes)
        module, attribute = self.homes[name].split(":")
        return getattr(importlib.import_module(module), attribute)
