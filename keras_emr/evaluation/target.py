"""What is attacked: a Keras model, or anything that can only be asked."""

from __future__ import annotations

import hashlib
import json
import math
import time

import keras
import numpy as np
from keras import ops

from keras_emr import backend
from keras_emr.errors import UserError
from keras_emr.evaluation.batching import padded
from keras_emr.evaluation.inputs import require_classifier
from keras_emr.losses import widen
from keras_emr.network import Network

_SMALLEST = 16


def as_target(model, image_shape, classes=None, batch_size=256):
    """The target for ``model``: a Keras classifier, a function of images, or a target already.

    Args:
        model: ``keras.Model`` to logits, or a function: (M, H, W, C) float32 NumPy images to
            (M, K) logits or probabilities, or to (M,) integer labels.
        image_shape: (H, W, C) of the images that it will be asked about.
        classes: number of classes K; a function that gives labels needs it.
        batch_size: most images at a time.

    Raises:
        UserError: neither a model nor a function; a model that takes other images or does not end
            in logits.
    """
    if isinstance(model, KerasTarget | FunctionTarget):
        return model
    if isinstance(model, keras.Model):
        require_classifier(model, image_shape)
        return KerasTarget(model, batch_size)
    if callable(model):
        return FunctionTarget(model, classes, batch_size)
    raise UserError(
        f"nothing that can be attacked. Received: {type(model).__name__}. Expected a keras.Model "
        "or a function from images to logits or labels."
    )


class Target:
    """What is attacked, as all kinds of it answer.

    Attributes:
        batch_size: most images at a time.
        asked: images that it was asked about.
        pace: seconds that an image took in the fastest batch so far; infinite before the first.
    """

    def __init__(self, batch_size):
        self.batch_size = batch_size
        self.asked, self.pace = 0, math.inf

    def predict(self, x):
        """Logits, log-probabilities or one-hot labels (M, K) of images (M, H, W, C), M >= 1."""
        self.asked += len(x)
        parts = []
        for begin in range(0, len(x), self.batch_size):
            part = x[begin : begin + self.batch_size]
            began = time.perf_counter()
            parts.append(self._scores(part))
            self.pace = min(self.pace, (time.perf_counter() - began) / len(part))
        return np.concatenate(parts)


class KerasTarget(Target):
    """A Keras classifier, in inference mode and float32.

    Attributes:
        model, network: the classifier, and it as attacks see it.
        classes: number of logits K.
    """

    gradients = True

    def __init__(self, model, batch_size=256):
        super().__init__(batch_size)
        self.model = model
        self.network = Network(model)
        self.classes = self.network.classes
        self._random = bool(self.network.seed_states)
        self._compiled = backend.compiled(self._logits, model.variables)

    def _logits(self, x, *noise):
        return widen(self.network.frozen(False, *noise)(x))

    def _shape(self, rows):
        """Rows of the batch that so many images travel in: few shapes where each is compiled."""
        if backend.SHAPES_COMPILED < math.inf:
            return rows
        size, least = self.batch_size, max(rows, _SMALLEST)
        while size // 2 >= least:
            size //= 2
        return size * 3 // 4 if size * 3 // 4 >= least else size

    def _scores(self, x):
        x, rows = np.asarray(x, keras.config.floatx()), len(x)
        # A random model answers with fresh noise each time, as it would anybody.
        noise = (ops.convert_to_tensor(self.asked, dtype="int32"),) if self._random else ()
        logits = self._compiled(ops.convert_to_tensor(padded(x, self._shape(rows))), *noise)
        return ops.convert_to_numpy(logits)[:rows]

    def fingerprint(self):
        """SHA-256 of the architecture and every weight."""
        digest = hashlib.sha256(self.model.to_json().encode())
        for variable in self.model.variables:
            digest.update(np.ascontiguousarray(ops.convert_to_numpy(variable.value)).tobytes())
        return digest.hexdigest()


class FunctionTarget(Target):
    """A function from images to scores or labels: a served model, another framework's.

    Attributes:
        classes: number of classes K, known after the first answer.
        gives: ``scores`` or ``labels``, known after the first answer.
    """

    gradients = False

    def __init__(self, function, classes=None, batch_size=256):
        super().__init__(batch_size)
        self.function = function
        self.classes = classes
        self.gives = None
        self._probabilities = None

    def _scores(self, x):
        answer = np.asarray(self.function(np.asarray(x, "float32")))
        if answer.ndim == 1 and np.issubdtype(answer.dtype, np.integer) and len(answer) == len(x):
            self.gives = "labels"
            if self.classes is None:
                raise UserError(
                    "the function gives labels. Received: no number of classes. Expected classes=K."
                )
            if answer.min() < 0 or answer.max() >= self.classes:
                raise UserError(
                    f"the function gives labels that are no classes. Received: {answer.min()} to "
                    f"{answer.max()}. Expected 0 to {self.classes - 1}."
                )
            return np.eye(self.classes, dtype="float32")[answer]
        if answer.ndim != 2 or len(answer) != len(x) or answer.shape[1] < 2:
            raise UserError(
                f"the function must give (M, K) scores or (M,) integer labels, K >= 2. Received: "
                f"shape {answer.shape}, dtype {answer.dtype} for {len(x)} images."
            )
        self.gives, self.classes = "scores", answer.shape[1]
        answer = answer.astype("float64")
        if self._probabilities is None:  # once: margins must not change their scale on the way
            sums = answer.sum(axis=1)
            self._probabilities = bool((answer >= 0).all() and (np.abs(sums - 1) < 1e-2).all())
        if self._probabilities:
            # Margins of probabilities vanish where the model is confident; logarithms do not.
            answer = np.log(np.maximum(answer, 1e-45))
        return answer

    def fingerprint(self):
        """A function has none; its name stands for it."""
        name = getattr(self.function, "__qualname__", type(self.function).__name__)
        return hashlib.sha256(json.dumps(name).encode()).hexdigest()


def auto_batch_size(model, image_shape, memory=2**30, largest=512):
    """Images at a time whose attack takes about ``memory`` bytes: a power of two.

    An attack step keeps the outputs of all layers, their gradients and about as much again in
    between. A side that depends on the image counts as the image's, which is too much rather than
    too little. A model that does not tell its layers' outputs gets 64.

    Args:
        model: Keras classifier.
        image_shape: (H, W, C).
    """
    numbers, largest_side = int(np.prod(image_shape)), max(image_shape[:2])
    for layer in model._flatten_layers(include_self=False):
        try:
            shape = layer.output.shape
        except (AttributeError, ValueError):
            continue
        numbers += int(np.prod([side or largest_side for side in shape[1:]]))
    if numbers == int(np.prod(image_shape)):
        return 64
    size = max(1, memory // (3 * 4 * numbers))
    return min(largest, 2 ** (size.bit_length() - 1))
