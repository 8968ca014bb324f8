"""A small served classifier of images with the signatures of an export, and a server for it.

It is linear, so that everything it answers can be worked out: logits ``x W + b``, effective
margins ``gap / |W_i - W_j|``.
"""

import os
import re
import select
import signal
import subprocess
import sys
import time

import numpy as np

SHAPE, CLASSES = (6, 5, 1), 3
LABELS = ("cat", "dog [red]", "owl")
THRESHOLD = 0.02  # of the effective margin in Linf
NUMBERS = int(np.prod(SHAPE))


def weights(scale=1.0):
    """Kernel (30, 3) and bias (3,)."""
    rng = np.random.default_rng(5)
    kernel = rng.normal(0, 0.5, (NUMBERS, CLASSES))
    kernel = scale * (kernel - kernel.mean(axis=0))  # or grey images are all of one class
    return kernel.astype("float32"), np.array([0.1, 0.0, -0.1], "float32")


def expected(images, scale=1.0):
    """What the model answers, in float64."""
    kernel, bias = (a.astype("float64") for a in weights(scale))
    logits = images.reshape(len(images), -1).astype("float64") @ kernel + bias
    shifted = np.exp(logits - logits.max(1, keepdims=True))
    first = logits.argmax(1)
    l2, linf, gaps = (np.full(len(images), np.inf) for _ in range(3))
    for k in range(CLASSES):
        others = first != k
        gap = logits[np.arange(len(logits)), first] - logits[:, k]
        w = kernel[:, first] - kernel[:, [k]]
        with np.errstate(divide="ignore", invalid="ignore"):
            l2 = np.where(others, np.minimum(l2, gap / np.linalg.norm(w, axis=0)), l2)
            linf = np.where(others, np.minimum(linf, gap / np.abs(w).sum(0)), linf)
        gaps = np.where(others, np.minimum(gaps, gap), gaps)
    return {
        "probabilities": shifted / shifted.sum(1, keepdims=True),
        "logits": logits,
        "class_id": first,
        "margin": gaps,
        "effective_margin_l2": l2,
        "effective_margin_linf": linf,
        "trusted": linf > THRESHOLD,
    }


def images(n=20, seed=0):
    """(n, 6, 5, 1) float32 in [0, 1]."""
    return np.random.default_rng(seed).uniform(0, 1, (n, *SHAPE)).astype("float32")


def build(folder, scale=1.0, robust=True):
    """Write the SavedModel to ``folder``."""
    import tensorflow as tf

    kernel, bias = weights(scale)
    module = tf.Module()
    module.kernel, module.bias = tf.Variable(kernel), tf.Variable(bias)
    distances = {
        "effective_margin_l2": np.linalg.norm(kernel[:, :, None] - kernel[:, None], axis=0),
        "effective_margin_linf": np.abs(kernel[:, :, None] - kernel[:, None]).sum(axis=0),
    }

    def predict(image):
        image = tf.ensure_shape(image, (None, *SHAPE))
        logits = tf.matmul(tf.reshape(image, (-1, NUMBERS)), module.kernel) + module.bias
        return {
            "probabilities": tf.nn.softmax(logits),
            "logits": logits,
            "class_id": tf.argmax(logits, -1),
        }

    def margins(image):
        found = predict(image)
        logits, first = found["logits"], tf.one_hot(found["class_id"], CLASSES)
        gaps = tf.reduce_sum(logits * first, -1, keepdims=True) - logits
        far = first * 1e9
        found["margin"] = tf.reduce_min(gaps + far, -1)
        for name, distance in distances.items():
            over = tf.gather(tf.constant(distance, tf.float32), found["class_id"])
            found[name] = tf.reduce_min(gaps / (over + first) + far, -1)
        found["trusted"] = found["effective_margin_linf"] > THRESHOLD
        return found

    def classify(inputs):
        features = {"image": tf.io.FixedLenFeature(SHAPE, tf.float32)}
        scores = predict(tf.io.parse_example(inputs, features)["image"])["probabilities"]
        return {
            "classes": tf.broadcast_to(tf.constant([LABELS]), tf.shape(scores)),
            "scores": scores,
        }

    def image_bytes(image_bytes):
        def decode(one):
            pixels = tf.io.decode_png(one, channels=1)
            resized = tf.image.resize(tf.cast(pixels, tf.float32) / 255, SHAPE[:2], antialias=True)
            return tf.clip_by_value(resized, 0.0, 1.0)

        return predict(tf.map_fn(decode, image_bytes, fn_output_signature=tf.TensorSpec(SHAPE)))

    image = tf.TensorSpec((None, *SHAPE), tf.float32, "image")
    functions = {
        "serving_default": (predict, image),
        "classify": (classify, tf.TensorSpec((None,), tf.string, "inputs")),
        "image_bytes": (image_bytes, tf.TensorSpec((None,), tf.string, "image_bytes")),
    }
    if robust:
        functions["robust"] = (margins, image)
    made = {
        name: tf.function(body, input_signature=[spec], autograph=False)
        for name, (body, spec) in functions.items()
    }
    module.functions = list(made.values())
    tf.saved_model.save(module, str(folder), signatures=made)


def build_store(folder):
    """``m`` with versions 1 and 2 (twice the weights), ``plain`` without the signature robust."""
    for path, options in (
        ("m/1", {}),
        ("m/2", {"scale": 2.0}),
        ("plain/1", {"robust": False}),
    ):
        build(folder / path, **options)
    config = folder / "models.config"
    config.write_text(
        f"""model_config_list {{
          config {{ name: "m" base_path: "{folder}/m" model_platform: "tensorflow"
            model_version_policy {{ all {{}} }}
            version_labels {{ key: "stable" value: 1 }} }}
          config {{ name: "plain" base_path: "{folder}/plain" model_platform: "tensorflow" }}
        }}"""
    )
    return config


class ServerProcess:
    """``keras-emr serve`` in a process of its own, on free ports. A context manager."""

    def __init__(self, config, *more):
        self._command = [
            *(sys.executable, "-m", "keras_emr_cli.main", "serve"),
            *("--model-config-file", str(config), "--port", "0", "--quiet"),
            *("--rest-api-port", "0", "--allow-version-labels-for-unavailable-models"),
            *map(str, more),
        ]

    def __enter__(self):
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "-1"}
        self.process = subprocess.Popen(
            self._command,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        told, until = "", time.monotonic() + 120
        while "Ctrl-C" not in told:
            left = max(0, until - time.monotonic())
            ready, _, _ = select.select([self.process.stdout], [], [], left)
            # Not by readline: what it buffers, select does not see.
            more = os.read(self.process.stdout.fileno(), 65536) if ready else b""
            assert more, f"the server does not start: {told}"
            told += more.decode()
        self.rest_port = int(re.search(r"REST: \S+:(\d+)/v1", told)[1])
        self.grpc_port = int(re.search(r"gRPC: \S+:(\d+)", told)[1])
        return self

    def __exit__(self, *details):
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()

    def url(self, rest="m"):
        return f"http://127.0.0.1:{self.rest_port}/v1/models/{rest}"

    def grpc_url(self, rest="m"):
        return f"grpc://127.0.0.1:{self.grpc_port}/v1/models/{rest}"
