"""Export to TensorFlow Serving, a development server that behaves like it, and a client.

Names are loaded on first use: a client needs neither TensorFlow nor Keras.
"""

from __future__ import annotations

import importlib

_HOME = {
    "Client": "keras_emr_serving.client.client",
    "ClientError": "keras_emr_serving.client.errors",
}

__all__ = sorted(_HOME)


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module 'keras_emr_serving' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__():
    return __all__
