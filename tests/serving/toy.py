"""The model that TensorFlow Serving's answers in ``rest_cases.json`` were recorded with.

``rest_cases.json`` holds, for each case, the verb, the body of the request, the HTTP status and the
body of the answer. Parsing, execution and texts are TensorFlow Serving's own code (master of July
2026, CPU); the status is its mapping of the code that came back. Names of graph nodes in a text
depend on how the model was traced: texts are compared up to the first line break.
"""

from pathlib import Path

WEIGHTS = [[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]


def build(folder, scale=1.0):
    """Write the SavedModel to ``folder``; ``scale`` multiplies the weights."""
    import tensorflow as tf

    x = tf.TensorSpec((None, 3), tf.float32, "x")
    examples = tf.TensorSpec((None,), tf.string, "inputs")
    module = tf.Module()
    module.weights = tf.Variable(scale * tf.constant(WEIGHTS))

    def scores(x):
        return tf.matmul(x, module.weights)

    def parsed(inputs):
        return tf.io.parse_example(inputs, {"x": tf.io.FixedLenFeature([3], tf.float32)})["x"]

    def multi(x):
        s = scores(x)
        return {"scores": s, "class_id": tf.argmax(s, -1), "ok": tf.reduce_sum(x, -1) > 0}

    def two(x, label):
        return {"loss": tf.reduce_sum(x, -1) - tf.cast(label, tf.float32)}

    def image(image_bytes):
        text = tf.fill(tf.shape(image_bytes), "hi")
        return {"len": tf.strings.length(image_bytes), "echo_bytes": image_bytes, "text": text}

    def ints(i):
        cast = {"i8": tf.int8, "u8": tf.uint8, "u32": tf.uint32, "i64": tf.int64}
        made = {name: tf.cast(i, dtype) for name, dtype in cast.items()}
        return {**made, "d": tf.cast(i, tf.float64) / 3.0, "b": i > 0}

    def classify(inputs):
        s = scores(parsed(inputs))
        return {"classes": tf.tile(tf.constant([["a", "b"]]), [tf.shape(s)[0], 1]), "scores": s}

    doubled = tf.function(lambda x: x * 2.0, jit_compile=True)
    plain = {
        "serving_default": (lambda x: {"scores": scores(x)}, x),
        "multi": (multi, x),
        "two": (two, x, tf.TensorSpec((None,), tf.int64, "label")),
        "image": (image, tf.TensorSpec((None,), tf.string, "image_bytes")),
        "scalar": (lambda x: {"mean": tf.reduce_mean(x)}, x),
        "half": (lambda x: {"h": tf.cast(x, tf.float16)}, x),
        "nan": (lambda x: {"z": x / 0.0}, x),
        "badbatch": (lambda x: {"a": x, "b": x[:1]}, x),
        "ints": (ints, tf.TensorSpec((None, 2), tf.int32, "i")),
        "classify": (classify, examples),
        "regress": (lambda inputs: {"outputs": tf.reduce_sum(parsed(inputs), -1)}, examples),
        "jit": (lambda x: {"y": doubled(x)}, x),
    }
    functions = {
        name: tf.function(body, input_signature=specs) for name, (body, *specs) in plain.items()
    }
    module.functions = list(functions.values())
    _save(module, folder, functions)
    names = tf.compat.v1.saved_model.signature_def_utils.MethodNameUpdater(str(folder))
    for key in ("classify", "regress"):
        names.replace_method_name(key, f"tensorflow/serving/{key}")
    names.save()
    return Path(folder)


def build_small(folder, scale=1.0):
    """Only ``serving_default``: x (n, 3) -> scores (n, 2). Quick to write and to load."""
    import tensorflow as tf

    module = tf.Module()
    module.weights = tf.Variable(scale * tf.constant(WEIGHTS))
    x = tf.TensorSpec((None, 3), tf.float32, "x")
    body = tf.function(lambda x: {"scores": tf.matmul(x, module.weights)}, input_signature=[x])
    _save(module, folder, {"serving_default": body})
    return Path(folder)


def build_conv(folder):
    """``serving_default``: image (n, 4, 4, 1) -> scores (n, 3, 3, 1), with no check of its own."""
    import tensorflow as tf

    module = tf.Module()
    module.kernel = tf.Variable(tf.ones((2, 2, 1, 1)))
    spec = tf.TensorSpec((None, 4, 4, 1), tf.float32, "image")
    body = tf.function(
        lambda image: {"scores": tf.nn.conv2d(image, module.kernel, 1, "VALID")},
        input_signature=[spec],
    )
    _save(module, folder, {"serving_default": body})
    return Path(folder)


def _save(module, folder, functions):
    import tensorflow as tf

    tf.saved_model.save(module, str(folder), signatures=functions)


def publish(made, target):
    """Copy a version to its final place in one step, as a careful exporter does."""
    import os
    import shutil

    hidden = Path(target).parent / f".{Path(target).name}.part"
    shutil.copytree(made, hidden)
    os.rename(hidden, target)


def build_slow(folder):
    """``serving_default``: x (n,) -> y (n,), busy for x seconds or so."""
    import tensorflow as tf

    def body(x):
        end = tf.timestamp() + tf.cast(tf.reduce_max(x), tf.float64)
        tf.while_loop(lambda: tf.timestamp() < end, lambda: (), ())
        with tf.control_dependencies([tf.timestamp()]):
            return {"y": tf.identity(x)}

    module = tf.Module()
    made = tf.function(body, input_signature=[tf.TensorSpec((None,), tf.float32, "x")])
    _save(module, folder, {"serving_default": made})
    return Path(folder)
