"""Requests that TensorFlow Serving replays when it loads a model.

The first call of a signature is ten to fifty times as slow as the next ones: the graph is
optimized then. A first larger batch is several times as slow once more: oneDNN makes its kernels.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from keras_emr.errors import UserError
from keras_emr_serving.server.warmup import FILE

LARGE = 32
_GRADIENTS = ("robust", "regress")
# Classes up to which signatures that take K - 1 input gradients are asked about a large batch: with
# a thousand, loading the model would take minutes.
_FEW = 32


def write(folder, name, signatures, classes, image, epsilon):
    """Write the requests where TensorFlow Serving looks for them: a single image and a batch.

    Args:
        folder: of the SavedModel.
        name: of the model.
        signatures: names of its signatures.
        classes: how many there are.
        image: (H, W, C) float32 in [0, 1], to ask about.
        epsilon: of the signature ``attack``.
    """
    import tensorflow as tf

    file = Path(folder) / FILE
    file.parent.mkdir(exist_ok=True)
    with tf.io.TFRecordWriter(str(file)) as writer:
        for signature in signatures:
            slow = signature == "attack" or (signature in _GRADIENTS and classes > _FEW)
            for n in (1,) if slow else (1, LARGE):
                log = request(name, signature, image, epsilon, n)
                writer.write(log.SerializeToString())


def request(name, signature, image, epsilon, n=1):
    """A ``PredictionLog`` that asks ``signature`` about ``n`` images in few bytes."""
    import tensorflow as tf

    try:
        from tensorflow_serving.apis import prediction_log_pb2
    except ImportError:
        raise UserError(
            "export needs the messages of TensorFlow Serving. Received: no package "
            "tensorflow-serving-api. Install it with: pip install 'keras-emr[serving]'"
        ) from None

    log = prediction_log_pb2.PredictionLog()
    if signature in ("classify", "regress"):
        asked = getattr(log, f"{signature}_log").request
        # The context is put before every example: the image travels once.
        both = asked.input.example_list_with_context
        both.context.CopyFrom(example(image))
        for _ in range(n):
            both.examples.add()
    else:
        asked = log.predict_log.request
        for key, value in _inputs(signature, image, epsilon, n).items():
            asked.inputs[key].CopyFrom(tf.make_tensor_proto(value))
        if "image" in asked.inputs and n > 1:
            # A tensor with too few values repeats the last one.
            sent = asked.inputs["image"]
            sent.tensor_content = b""
            sent.float_val[:] = [float(image.mean())]
    asked.model_spec.name = name
    asked.model_spec.signature_name = signature
    return log


def example(image):
    """``tf.train.Example`` of an image (H, W, C), as ``classify`` and ``regress`` take it."""
    import tensorflow as tf

    floats = tf.train.FloatList(value=np.ravel(image))
    return tf.train.Example(
        features=tf.train.Features(feature={"image": tf.train.Feature(float_list=floats)})
    )


def _inputs(signature, image, epsilon, n):
    if signature == "image_bytes":
        return {"image_bytes": np.array([_png(image)] * n, object)}
    inputs = {"image": np.repeat(image[None], n, axis=0)}
    if signature == "attack":
        inputs["label"] = np.zeros(n, "int64")
        inputs["epsilon"] = np.full(n, epsilon, "float32")
        inputs["steps"] = np.ones(n, "int32")
    return inputs


def _png(image):
    import tensorflow as tf

    pixels = np.round(255 * image).astype("uint8")
    return tf.io.encode_png(pixels).numpy()
