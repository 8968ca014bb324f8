"""What a served model answers: TensorFlow functions around a Keras classifier.

Every function begins with ``tf.ensure_shape``: TensorFlow Serving does not check what it is sent,
and an image of the wrong rank would end the whole server inside a convolution. None is compiled
by XLA, which TensorFlow Serving turns off.
"""

from __future__ import annotations

import tensorflow as tf

from keras_emr import backend
from keras_emr.attacks.pgd import STEP_RATIO
from keras_emr.evaluation.margins import boundary_distances
from keras_emr.geometry import ascent, per_example, project
from keras_emr.losses import cross_entropy, widen
from keras_emr.network import Network

MAX_STEPS = 1000  # of a served attack: a request must not keep a server busy for hours
MAX_PIXELS = 2**25  # of an encoded image, before it is resized: 400 MB as float32 RGB
_PNG = b"\x89PNG\r\n\x1a\n"


class Served(tf.Module):
    """A classifier and the functions that are exported with it.

    Args:
        model: Keras classifier to logits, on the TensorFlow backend.
        image_shape: (H, W, C).
        labels: K names, in the order of the logits.
        norm: ``linf`` or ``l2``, of the threat model.
        threshold: effective margin in that norm above which a prediction is trusted.
    """

    def __init__(self, model, image_shape, labels, norm="linf", threshold=0.0):
        super().__init__()
        # The variables themselves, not the layers: a tracked Keras model saves every weight twice.
        self.kept = [variable.value for variable in model.variables]
        self._network = Network(model)
        self._shape = tuple(image_shape)
        self._labels = tuple(labels)
        self._norm = norm
        self._threshold = threshold

    def signatures(self, with_attack=False):
        """Concrete functions by signature name; which there are depends on the model.

        ``image_bytes`` needs 1, 3 or 4 channels, as PNG has them.
        """
        images = tf.TensorSpec((None, *self._shape), tf.float32, "image")
        strings = tf.TensorSpec((None,), tf.string, "inputs")
        functions = {
            "serving_default": (self.predict, [images]),
            "robust": (self.robust, [images]),
            "classify": (self.classify, [strings]),
            "regress": (self.regress, [strings]),
        }
        if self._shape[-1] in (1, 3, 4):
            encoded = tf.TensorSpec((None,), tf.string, "image_bytes")
            functions["image_bytes"] = (self.image_bytes, [encoded])
        if with_attack:
            rest = [
                tf.TensorSpec((None,), dtype, name)
                for name, dtype in (
                    ("label", tf.int64),
                    ("epsilon", tf.float32),
                    ("steps", tf.int32),
                )
            ]
            functions["attack"] = (self.attack, [images, *rest])
        return {
            name: tf.function(function, autograph=False).get_concrete_function(*specs)
            for name, (function, specs) in functions.items()
        }

    def logits(self, image):
        """Float32 logits (N, K), in inference mode and full precision."""
        # Folded, the kernels would be scaled again for every request.
        return tf.cast(widen(self._network.frozen(fold=False)(image)), tf.float32)

    def predict(self, image):
        """Images (N, H, W, C) in [0, 1] -> ``probabilities``, ``logits`` (N, K), ``class_id``."""
        return _answers(self.logits(self._checked(image)))

    def robust(self, image):
        """:meth:`predict` and how far the boundary is.

        ``margin`` (N,): largest logit minus the next. ``effective_margin_l2``,
        ``effective_margin_linf`` (N,): as :func:`keras_emr.effective_margins` defines them, for
        the predicted class; infinite where the input gradient is zero. ``trusted`` (N,) bool.
        """
        logits, margins = self.margins(self._checked(image))
        top = tf.math.top_k(logits, 2).values
        return {
            **_answers(logits),
            "margin": top[:, 0] - top[:, 1],
            "effective_margin_l2": margins["l2"],
            "effective_margin_linf": margins["linf"],
            "trusted": margins[self._norm] > self._threshold,
        }

    def margins(self, image):
        """Logits (N, K), and effective margins (N,) of the predicted class by norm."""
        logits, _, pullback = backend.vjp(lambda x: (self.logits(x), ()), image)
        l2, linf = boundary_distances(logits, pullback, tf.argmax(logits, axis=-1))
        return logits, {"l2": l2, "linf": linf}

    def attack(self, image, label, epsilon, steps):
        """PGD on the cross-entropy, from the image itself; nothing is drawn at random.

        As ``keras_emr.PGD(epsilon, norm, steps, start="none")``, with an epsilon and a number of
        steps for each image: (N,) each, like the labels.

        Returns:
            ``adversarial`` (N, H, W, C) and its ``logits`` (N, K).
        """
        image = self._checked(image)
        label, epsilon, steps = (tf.ensure_shape(v, (None,)) for v in (label, epsilon, steps))
        classes = len(self._labels)
        fine = tf.math.is_finite(epsilon) & (epsilon >= 0)
        checks = [
            *(
                tf.debugging.assert_equal(
                    tf.shape(value)[0],
                    tf.shape(image)[0],
                    f"{name}: expected one for each image",
                )
                for name, value in (("label", label), ("epsilon", epsilon), ("steps", steps))
            ),
            tf.debugging.Assert(
                tf.reduce_all((label >= 0) & (label < classes)),
                [f"label: expected 0 to {classes - 1}"],
            ),
            tf.debugging.Assert(tf.reduce_all(fine), ["epsilon: expected finite numbers >= 0"]),
            tf.debugging.Assert(
                tf.reduce_all((steps >= 0) & (steps <= MAX_STEPS)),
                [f"steps: expected 0 to {MAX_STEPS}"],
            ),
        ]
        with tf.control_dependencies([check for check in checks if check is not None]):
            image = tf.identity(image)
        stride = STEP_RATIO[self._norm] * epsilon / tf.cast(tf.maximum(steps, 1), tf.float32)

        def loss(adversarial):
            return cross_entropy(label, self.logits(adversarial)), ()

        def step(i, adversarial):
            _, _, gradient = backend.value_and_grad(loss, adversarial)
            moved = adversarial + per_example(stride, image) * ascent(gradient, self._norm)
            moved = project(moved, image, epsilon, self._norm)
            return i + 1, tf.where(per_example(i < steps, image), moved, adversarial)

        most = tf.reduce_max(tf.concat([steps, [0]], 0))
        _, adversarial = tf.while_loop(
            lambda i, _: i < most,
            step,
            (0, image),
            shape_invariants=(tf.TensorShape([]), tf.TensorShape((None, *self._shape))),
        )
        return {"adversarial": adversarial, "logits": self.logits(adversarial)}

    def classify(self, inputs):
        """Serialized tf.Example with H*W*C floats ``image`` -> ``classes``, ``scores`` (N, K)."""
        probabilities = tf.nn.softmax(self.logits(self._parsed(inputs)))
        names = tf.broadcast_to(tf.constant([self._labels]), tf.shape(probabilities))
        return {"classes": names, "scores": probabilities}

    def regress(self, inputs):
        """Serialized tf.Example as for :meth:`classify` -> effective margin ``outputs`` (N,)."""
        _, margins = self.margins(self._parsed(inputs))
        return {"outputs": margins[self._norm]}

    def image_bytes(self, image_bytes):
        """PNG or JPEG files (N,) of any size -> as :meth:`predict`.

        Pixels are divided by 255; an image of another size is resized, bilinear and antialiased.
        """
        encoded = tf.ensure_shape(image_bytes, (None,))
        shape = tf.TensorSpec(self._shape, tf.float32)
        images = tf.map_fn(self._decoded, encoded, fn_output_signature=shape)
        return _answers(self.logits(self._checked(images)))

    def _checked(self, image):
        return tf.ensure_shape(image, (None, *self._shape))

    def _parsed(self, inputs):
        inputs = tf.ensure_shape(inputs, (None,))
        features = {"image": tf.io.FixedLenFeature(self._shape, tf.float32)}
        return self._checked(tf.io.parse_example(inputs, features)["image"])

    def _decoded(self, encoded):
        is_png = tf.equal(tf.strings.substr(encoded, 0, len(_PNG)), _PNG)
        known = tf.debugging.Assert(
            is_png | tf.io.is_jpeg(encoded), ["image_bytes: expected PNG or JPEG files"]
        )
        with tf.control_dependencies([known]):
            encoded = tf.identity(encoded)
        # The header tells the size, before a small file is unpacked to a huge image.
        sides = tf.cond(is_png, lambda: _png_sides(encoded), lambda: _jpeg_sides(encoded))
        small = tf.debugging.Assert(
            tf.reduce_prod(sides) <= MAX_PIXELS,
            [f"image_bytes: expected images of at most {MAX_PIXELS} pixels"],
        )
        with tf.control_dependencies([small]):
            encoded = tf.identity(encoded)
        height, width, channels = self._shape
        pixels = tf.io.decode_image(encoded, channels=channels, expand_animations=False)
        pixels = tf.ensure_shape(pixels, (None, None, channels))
        pixels = tf.cast(pixels, tf.float32) / 255.0
        fits = tf.reduce_all(tf.equal(tf.shape(pixels)[:2], (height, width)))
        resized = tf.cond(
            fits,
            lambda: pixels,
            lambda: tf.image.resize(pixels, (height, width), antialias=True),
        )
        return tf.clip_by_value(tf.ensure_shape(resized, self._shape), 0.0, 1.0)


def _answers(logits):
    return {
        "probabilities": tf.nn.softmax(logits),
        "logits": logits,
        "class_id": tf.argmax(logits, axis=-1, output_type=tf.int64),
    }


def _png_sides(encoded):
    # Zeros behind a file that ends too early: substr's own error would quote its bytes.
    sides = tf.strings.substr(encoded + "\0" * 24, 16, 8)
    numbers = tf.cast(tf.io.decode_raw(sides, tf.uint8), tf.int64)
    # 32 bits each: the product of two fits an int64 after this cap.
    weights = tf.constant([2**24, 2**16, 2**8, 1], tf.int64)
    return tf.minimum(tf.reduce_sum(tf.reshape(numbers, (2, 4)) * weights, 1), MAX_PIXELS + 1)


def _jpeg_sides(encoded):
    return tf.cast(tf.io.extract_jpeg_shape(encoded), tf.int64)[:2]
