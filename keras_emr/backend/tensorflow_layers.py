"""TensorFlow: functions of layers with derivatives of their own.

For a second derivative that ends there: TensorFlow's own goes on from a gradient to what the
function was applied to, with zeros.
"""

import tensorflow as tf


@tf.custom_gradient
def _relu(x):
    y = tf.nn.relu(x)

    def gradient(dy):
        return tf.raw_ops.ReluGrad(gradients=dy, features=tf.stop_gradient(y))

    return y, gradient


def _leaky_relu(x, slope):
    @tf.custom_gradient
    def apply(x):
        def gradient(dy):
            features = tf.stop_gradient(x)
            return tf.raw_ops.LeakyReluGrad(gradients=dy, features=features, alpha=slope)

        return tf.nn.leaky_relu(x, slope), gradient

    return apply(x)


def _max_pool(x, size):
    window = {"ksize": (1, *size, 1), "strides": (1, *size, 1), "padding": "VALID"}

    @tf.custom_gradient
    def apply(x):
        y = tf.raw_ops.MaxPool(input=x, **window)

        def gradient(dy):
            given, pooled = tf.stop_gradient(x), tf.stop_gradient(y)
            return tf.raw_ops.MaxPoolGrad(orig_input=given, orig_output=pooled, grad=dy, **window)

        return y, gradient

    return apply(x)


def _batch_norm(x, scale, offset, mean, variance, epsilon, training):
    if not training:
        return tf.nn.batch_normalization(x, mean, variance, offset, scale, epsilon), mean, variance
    y, mean, corrected, *_ = tf.raw_ops.FusedBatchNormV3(
        x=x,
        scale=tf.ones_like(mean) if scale is None else scale,
        offset=tf.zeros_like(mean) if offset is None else offset,
        mean=[],
        variance=[],
        epsilon=epsilon,
    )
    count = tf.cast(tf.size(x) // tf.size(mean), x.dtype)
    return y, mean, corrected * (tf.maximum(count - 1, 1) / count)


def cheaper(twice):
    """Functions whose results cost less, or cost less to differentiate, by name."""
    if not twice:
        return {"batch_norm": _batch_norm}
    return {"relu": _relu, "leaky_relu": _leaky_relu, "max_pool": _max_pool}
