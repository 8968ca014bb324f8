"""Write a classifier as a SavedModel; needs the TensorFlow backend of Keras."""

from __future__ import annotations

import contextlib
import errno
import logging

import tensorflow as tf

from keras_emr_serving.export.signatures import Served

METHODS = {"classify": "tensorflow/serving/classify", "regress": "tensorflow/serving/regress"}


def write(served, folder, with_attack=False):
    """Save ``served``, every weight once, for ``tf.saved_model.load`` and TensorFlow Serving.

    Args:
        served: :class:`Served`.
        folder: new folder.
        with_attack: also the signature ``attack``.

    Returns:
        Names of the signatures.

    Raises:
        OSError: it cannot be written, for example because the disk is full.
    """
    signatures = served.signatures(with_attack)
    logging.getLogger("tensorflow").setLevel(logging.ERROR)
    with file_errors():
        tf.saved_model.save(served, str(folder), signatures=signatures)
        _set_methods(folder)
    return sorted(signatures)


@contextlib.contextmanager
def file_errors():
    """TensorFlow's errors about files as the ``OSError`` they are."""
    try:
        yield
    except tf.errors.OpError as error:
        raise OSError(errno.EIO, error.message) from None


def _set_methods(folder):
    # Saved as predict, all of them: a server that checks method names would refuse these two.
    names = tf.compat.v1.saved_model.signature_def_utils.MethodNameUpdater(str(folder))
    for signature, method in METHODS.items():
        names.replace_method_name(signature, method, tags="serve")
    names.save()


def build(model, folder, labels, x_val, y_val, epsilon, norm, keep, with_attack=False):
    """Choose the threshold of ``trusted`` on validation data, and save.

    Args:
        model: Keras classifier to logits.
        folder: new folder of the SavedModel.
        labels: names of the classes, in the order of the logits; the model may have more.
        x_val, y_val: validation images (N, H, W, C) in [0, 1] and labels (N,).
        epsilon, norm: threat model.
        keep: see :func:`choose_threshold`.
        with_attack: also the signature ``attack``.

    Returns:
        Dictionary: ``signatures``, ``labels``, ``threshold``, ``parameters``.
    """
    from keras_emr.evaluation.margins import effective_margins
    from keras_emr.evaluation.target import KerasTarget, auto_batch_size
    from keras_emr.network import Network
    from keras_emr_serving.export.threshold import choose_threshold

    shape, classes = x_val.shape[1:], Network(model).classes
    labels = [*labels, *map(str, range(len(labels), classes))]
    size = min(256, auto_batch_size(model, shape))
    predicted = KerasTarget(model, size).predict(x_val).argmax(axis=1)
    margins = effective_margins(model, x_val, predicted, size)
    right = predicted == y_val
    threshold, rule = choose_threshold(getattr(margins, norm), right, keep, float(epsilon))
    names = write(Served(model, shape, labels, norm, threshold), folder, with_attack)
    return {
        "signatures": names,
        "labels": labels,
        "threshold": {
            "value": threshold,
            "norm": norm,
            "rule": rule,
            "validation_images": len(x_val),
            "right": int(right.sum()),
        },
        "parameters": int(model.count_params()),
    }
