"""Run a SavedModel as TensorFlow Serving does: by the Session loader, without XLA or Keras.

For a process of its own: it blocks imports and turns XLA off for good. The model goes through the
development server's own loader, so that what passes here is what answers there.
"""

from __future__ import annotations

import sys

import numpy as np

BLOCKED = ("keras", "tf_keras", "jax", "jaxlib", "torch")


def isolate():
    """Make imports of Keras and the other backends fail from here on; turn XLA off.

    Returns:
        Whether XLA could be turned off: by a symbol of TensorFlow's library, which a build need
        not export.
    """
    loaded = [name for name in BLOCKED if sys.modules.get(name) is not None]
    if loaded:
        raise RuntimeError(f"imported already: {', '.join(loaded)}")
    for name in BLOCKED:
        sys.modules[name] = None
    from keras_emr_serving.server.servable import disable_xla

    return disable_xla()


def observe(folder, images, margin_images, size=64):
    """What the served model says, after its warm-up requests.

    Args:
        folder: of the SavedModel.
        images: (N, H, W, C) for ``serving_default``.
        margin_images: (M, H, W, C) for ``robust``.
        size: images at a time.

    Returns:
        Dictionary: ``logits`` (N, K) and ``class_id`` (N,) of ``serving_default``; ``l2``,
        ``linf``, ``trusted`` (M,) and ``robust_logits`` (M, K) of ``robust``.

    Raises:
        ServingError: the model does not load, or refuses a request.
    """
    from keras_emr_serving.server import inference, warmup
    from keras_emr_serving.server.servable import Servable

    servable = Servable(folder)
    model = inference.Model(servable.signatures, servable.run)
    warmup.replay(folder, model)

    def answers(signature, images, *outputs):
        batches = [images[begin : begin + size] for begin in range(0, len(images), size)]
        told = [inference.predict(model, signature, {"image": b}, outputs) for b in batches]
        return [np.concatenate([one[key] for one in told]) for key in outputs]

    robust = ("logits", "effective_margin_l2", "effective_margin_linf", "trusted")
    keys = ("logits", "class_id", "robust_logits", "l2", "linf", "trusted")
    values = (
        *answers("serving_default", images, "logits", "class_id"),
        *answers("robust", margin_images, *robust),
    )
    return dict(zip(keys, values, strict=True))
