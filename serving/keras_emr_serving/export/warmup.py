"""Requests that TensorFlow Serving replays when it loads a model, one for each signature.

The first call of a signature is ten to fifty times as slow as the next ones: the graph is
optimized then.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from keras_emr.errors import UserError
from keras_emr_serving.server.warmup import FILE


def write(folder, name, signatures, image, epsilon):
    """Write the requests where TensorFlow Serving looks for them.

    Args:
        folder: of the SavedModel.
        name: of the model.
        signatures: names of its signatures.
        image: (H, W, C) float32 in [0, 1], to ask about.
        epsilon: of the signature ``attack``.
    """
    import tensorflow as tf

    file = Path(folder) / FILE
    file.parent.mkdir(exist_ok=True)
    with tf.io.TFRecordWriter(str(file)) as writer:
        for signature in signatures:
            log = request(name, signature, image, epsilon)
            writer.write(log.SerializeToString())


def request(name, signature, image, epsilon):
    """A ``PredictionLog`` that asks ``signature`` about ``image``, a batch of one."""
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
        asked.input.example_list.examples.append(example(image))
    else:
        asked = log.predict_log.request
        for key, value in _inputs(signature, image, epsilon).items():
            asked.inputs[key].CopyFrom(tf.make_tensor_proto(value))
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


def _inputs(signature, image, epsilon):
    if signature == "image_bytes":
        return {"image_bytes": np.array([_png(image)], object)}
    inputs = {"image": image[None]}
    if signature == "attack":
        inputs["label"] = np.zeros(1, "int64")
        inputs["epsilon"] = np.array([epsilon], "float32")
        inputs["steps"] = np.ones(1, "int32")
    return inputs


def _png(image):
    import tensorflow as tf

    pixels = np.round(255 * image).astype("uint8")
    return tf.io.encode_png(pixels).numpy()
