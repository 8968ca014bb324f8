"""Convolutional generators of perturbations: learning to learn, and GAT."""

from __future__ import annotations

import keras
from keras import layers, ops

from keras_emr.maximizers.preprocessing import preprocess
from keras_emr.part import non_negative, one_of, register, whole

READS = ("image", "image_gradient", "gradient")


@register
class Generator(keras.layers.Layer):
    """A small convolutional network that proposes a whole perturbation, ``tanh`` of its output.

    The baselines of learned maximizers (Jiang et al., AISTATS 2021; Lee et al., 2017):

    * ``image``: sees the image alone (naive L2L);
    * ``image_gradient``: the image and ``g / max_j |g_j|``, per example (gradient L2L; the
      authors' code divides by the maximum over the batch, which lets batch mates change an
      example's attack). With two or more attack steps and ``latent=True``: multi-step L2L;
    * ``gradient``: the scaled gradient alone (GAT).

    ``depth`` convolutions 3x3 with ``width`` channels and ReLU, then one to the image's channels.
    The size is ours; the released L2L attackers have 350 thousand to 1.7 million weights.

    Args:
        reads: ``image``, ``image_gradient`` or ``gradient``.
        width: channels, >= 1.
        depth: hidden convolutions, >= 1.
        power_penalty: what training subtracts per squared L2 length of a perturbation (GAT's
            c_g), >= 0.
        scale: length of a step of 1, in [0, 1] pixel units; ``None``: the attack's epsilon.
        seed: of the initial weights.
        trained_for: facts of the training, filled in by ``RobustClassifier``: epsilon,
            channels, steps, latent.

    Raises:
        UserError: an unknown ``reads`` or a size below 1.
    """

    def __init__(
        self,
        reads="image_gradient",
        width=32,
        depth=3,
        power_penalty=0.0,
        scale=None,
        seed=0,
        trained_for=None,
        **kwargs,
    ):
        super().__init__(**{"dtype": keras.config.floatx(), "name": "maximizer", **kwargs})
        self.reads = one_of("reads", reads, READS)
        self.width = whole("width", width, 1)
        self.depth = whole("depth", depth, 1)
        self.power_penalty = non_negative("power_penalty", power_penalty)
        self.scale = None if scale is None else non_negative("scale", scale)
        self.seed = seed
        self.trained_for = trained_for
        self.convolutions = []

    @property
    def reads_gradient(self):
        return self.reads != "image"

    def build(self, image_shape):
        """Make the weights for images (N, H, W, C); only C matters."""
        channels = image_shape[-1]
        seen = 2 * channels if self.reads == "image_gradient" else channels
        sizes = [self.width] * self.depth + [channels]
        for i, size in enumerate(sizes):
            last = i == self.depth
            convolution = layers.Conv2D(
                size,
                3,
                padding="same",
                activation="tanh" if last else "relu",
                kernel_initializer=keras.initializers.VarianceScaling(
                    0.1 if last else 2.0, seed=self.seed + i
                ),
                dtype=self.dtype_policy,
                name=f"convolution_{i}",
            )
            convolution.build((None, None, None, seen))
            # TensorFlow hands a change of `trainable` down, but not its value at the start.
            convolution.trainable = self.trainable
            self.convolutions.append(convolution)
            seen = size
        super().build(image_shape)

    def initial_state(self, x):
        """A generator remembers nothing from step to step."""
        return ()

    def call(self, image, gradient, state):
        """One proposal.

        Args:
            image: (N, H, W, C), the current images; gradients of the weights flow through it.
            gradient: same shape, or ``None`` if it is not read.
            state: empty.

        Returns:
            ``(step, state)``: step (N, H, W, C) in units of ``scale``, within [-1, 1].
        """
        signal = image
        if self.reads_gradient:
            (relative,), _ = preprocess("max_abs", gradient, ())
            signal = relative
            if self.reads == "image_gradient":
                signal = ops.concatenate([image, relative], axis=-1)
        for convolution in self.convolutions:
            signal = convolution(signal)
        return signal, state

    def penalty(self, step):
        """What training subtracts from the objective for a step (N, H, W, C), summed."""
        return self.power_penalty * ops.sum(ops.square(step))

    def describe(self):
        """Plain facts for reports."""
        keys = ("reads", "width", "depth", "power_penalty")
        config = self.get_config()
        return {"cell": "generator", **{k: config[k] for k in keys}} | {
            "parameters": self.count_params() if self.built else None
        }

    def get_config(self):
        return {
            **super().get_config(),
            "reads": self.reads,
            "width": self.width,
            "depth": self.depth,
            "power_penalty": self.power_penalty,
            "scale": self.scale,
            "seed": self.seed,
            "trained_for": self.trained_for,
        }
