"""Run a SavedModel as TensorFlow Serving does: by the Session loader, without XLA or Keras.

For a process of its own: it blocks imports and turns XLA off for good.
"""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

import numpy as np

BLOCKED = ("keras", "tf_keras", "jax", "jaxlib", "torch")


def isolate():
    """Make imports of Keras and the other backends fail from here on; import TensorFlow.

    Returns:
        Whether XLA could be turned off as well: by a symbol of TensorFlow's library, which a build
        need not export.
    """
    loaded = [name for name in BLOCKED if sys.modules.get(name) is not None]
    if loaded:
        raise RuntimeError(f"imported already: {', '.join(loaded)}")
    for name in BLOCKED:
        sys.modules[name] = None
    import tensorflow as tf

    for library in Path(tf.__file__).parent.glob("libtensorflow_cc.*"):
        turn_off = getattr(
            ctypes.CDLL(str(library)), "_ZN10tensorflow21DisableXlaCompilationEv", None
        )
        if turn_off is not None:
            turn_off()
            return True
    return False


class Session:
    """The signatures of a SavedModel through TensorFlow 1's loader: ``session(name, inputs)``."""

    def __init__(self, folder):
        import tensorflow as tf

        v1 = tf.compat.v1
        graph = tf.Graph()
        self._session = v1.Session(graph=graph)
        with graph.as_default():
            meta = v1.saved_model.load(self._session, ["serve"], str(folder))
        self._signatures = meta.signature_def

    def __call__(self, name, inputs, only=None):
        """Outputs by name, NumPy arrays; ``inputs`` by name likewise, ``only``: these outputs."""
        signature = self._signatures[name]
        feeds = {signature.inputs[key].name: value for key, value in inputs.items()}
        keys = [key for key in signature.outputs if only is None or key in only]
        fetched = self._session.run([signature.outputs[key].name for key in keys], feeds)
        return dict(zip(keys, fetched, strict=True))

    def batches(self, name, images, size=64, only=None):
        """As a call with ``image``, in batches of ``size``."""
        parts = [
            self(name, {"image": images[begin : begin + size]}, only)
            for begin in range(0, len(images), size)
        ]
        return {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}


def observe(folder, images, margin_images, size=64):
    """What the served model says; also replays the warm-up requests.

    Args:
        folder: of the SavedModel.
        images: (N, H, W, C) for ``serving_default``.
        margin_images: (M, H, W, C) for ``robust``.
        size: images at a time.

    Returns:
        Dictionary: ``logits`` (N, K) and ``class_id`` (N,) of ``serving_default``; ``l2``,
        ``linf``, ``trusted`` (M,) and ``robust_logits`` (M, K) of ``robust``.
    """
    from keras_emr_serving import warmup

    session = Session(folder)
    served = session.batches("serving_default", images, size, only=("logits", "class_id"))
    robust = session.batches("robust", margin_images, size)
    for log in warmup.read(folder):
        name, inputs = warmup.feeds(log)
        session(name, inputs)
    return {
        "logits": served["logits"],
        "class_id": served["class_id"],
        "robust_logits": robust["logits"],
        "l2": robust["effective_margin_l2"],
        "linf": robust["effective_margin_linf"],
        "trusted": robust["trusted"],
    }
