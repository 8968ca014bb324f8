"""The learned optimizer of Xiong & Hsieh (ECCV 2020): a recurrent cell shared by all pixels."""

from __future__ import annotations

import keras
import numpy as np
from keras import ops

from keras_emr import backend
from keras_emr.maximizers.preprocessing import (
    FEATURES,
    PREPROCESSINGS,
    initial_state,
    preprocess,
)
from keras_emr.part import non_negative, one_of, register, whole

CELLS = ("lstm", "rnn")
OUTPUTS = ("linear", "tanh")


@register
class LearnedMaximizer(keras.layers.Layer):
    """Coordinate-wise recurrent network: input gradients in, attack steps out.

    Every pixel is a sequence of its own and all share the same few weights, so that one
    maximizer serves any image size. Per coordinate, with features ``u`` of the gradient:

    * ``rnn`` (Elman): ``h <- tanh(U u + W h)``;
    * ``lstm``: ``i, f, o = sigmoid(.)``, ``a = tanh(.)`` of ``U u + W h``;
      ``c <- f c + i a``, ``h <- o tanh(c)``;
    * step ``V h``, or ``tanh(V h)``, in units of ``scale``.

    No biases by default: a pixel whose gradient is zero stays where it is, and the ``rnn`` is odd
    in the gradients. With ``hidden=10`` the ``rnn`` has 120 parameters, the ``lstm`` 450. The
    weights start as a plain rule: ``W = 0``, and ``V`` such that a first feature of 1 gives a step
    of ``initial_step``, uphill; with ``preprocessing="sign"`` the untrained ``rnn`` is PGD.

    The paper's text was not available to us. Its abstract says recurrent network, co-trained; the
    rest (cell, size, inputs, scaling) are our choices, guided by the authors' neighbouring code.

    Args:
        cell: ``lstm`` or ``rnn``.
        hidden: size of the hidden state H.
        layers: cells on top of one another.
        preprocessing: ``rms``, ``sign``, ``raw``, ``max_abs``, ``log_sign`` or ``adam_ratio``
            (:func:`keras_emr.maximizers.preprocessing.preprocess`).
        output: ``linear`` or ``tanh``.
        scale: length of a step of 1, in [0, 1] pixel units; ``None``: the attack's epsilon.
        use_bias: biases in the cells and the output.
        initial_step: the untrained step for a feature of 1, in units of ``scale``.
        seed: of the initial weights.
        trained_for: facts of the training, filled in by ``RobustClassifier``: epsilon,
            channels, steps, latent.

    Raises:
        UserError: an unknown cell, preprocessing or output; a size below 1.
    """

    reads_gradient = True
    replayable = True  # cheap to call again (`backend.chain`), and has no convolution

    def __init__(
        self,
        cell="lstm",
        hidden=10,
        layers=1,
        preprocessing="rms",
        output="linear",
        scale=None,
        use_bias=False,
        initial_step=0.25,
        seed=0,
        trained_for=None,
        **kwargs,
    ):
        super().__init__(**{"dtype": keras.config.floatx(), "name": "maximizer", **kwargs})
        self.cell = one_of("cell", cell, CELLS)
        self.hidden = whole("hidden", hidden, 1)
        self.layers = whole("layers", layers, 1)
        self.preprocessing = one_of("preprocessing", preprocessing, PREPROCESSINGS)
        self.output_activation = one_of("output", output, OUTPUTS)
        self.scale = None if scale is None else non_negative("scale", scale)
        self.use_bias = use_bias
        self.initial_step = non_negative("initial_step", initial_step)
        self.seed = seed
        self.trained_for = trained_for
        self.inputs = FEATURES[preprocessing]
        self._make_weights()
        self.built = True

    def _make_weights(self):
        rng = np.random.default_rng(self.seed)
        gates = 4 if self.cell == "lstm" else 1
        hidden, size = self.hidden, self.inputs
        self.kernels, self.recurrent_kernels, self.biases = [], [], []
        # What a first feature of 1 makes of the hidden state, to aim the output uphill. Of a
        # pair of features the second is the signed one.
        probe = np.zeros((size, 1))
        probe[-1] = 1.0
        for i in range(self.layers):
            kernel = rng.normal(size=(gates * hidden, size)) / np.sqrt(size)
            if size == 2 and i == 0:
                kernel[:, 0] *= 0.1  # the log of the size must not drown the direction
            self.kernels.append(self._weight((gates * hidden, size), kernel, f"kernel_{i}"))
            self.recurrent_kernels.append(
                self._weight((gates * hidden, hidden), 0.0, f"recurrent_kernel_{i}")
            )
            if self.use_bias:
                self.biases.append(self._weight((gates * hidden, 1), 0.0, f"bias_{i}"))
            probe = _first_output(self.cell, kernel @ probe)
            size = hidden
        reach = np.abs(probe).sum()
        step = np.arctanh(min(self.initial_step, 0.99)) if self._bounded else self.initial_step
        self.output_kernel = self._weight((1, hidden), step * np.sign(probe.T) / reach, "output")
        self.output_bias = self._weight((1, 1), 0.0, "output_bias") if self.use_bias else None

    @property
    def _bounded(self):
        return self.output_activation == "tanh"

    def _weight(self, shape, value, name):
        values = np.broadcast_to(np.asarray(value), shape)

        def initializer(shape, dtype=None):
            return ops.convert_to_tensor(values, dtype=dtype)

        return self.add_weight(shape=shape, initializer=initializer, name=name)

    def initial_state(self, x):
        """State before the first step: moments of the inputs, then each cell's ``h`` (and ``c``).

        A hidden state has shape (H, N * pixels): one row per unit is what a CPU adds fastest.
        """
        zeros = ops.reshape(ops.zeros_like(x), (1, -1))
        zeros = ops.repeat(zeros, self.hidden, axis=0)
        per_layer = (zeros, zeros) if self.cell == "lstm" else (zeros,)
        return (*initial_state(self.preprocessing, x), *(per_layer * self.layers))

    def call(self, image, gradient, state):
        """One step.

        Args:
            image: (N, H, W, C), not used: the generators' protocol.
            gradient: (N, H, W, C), of the summed objective at the current images.
            state: see :meth:`initial_state`; ``()`` is that state, and cheaper than its zeros.

        Returns:
            ``(step, state)``: step (N, H, W, C) in units of ``scale``.
        """
        per_layer = 2 if self.cell == "lstm" else 1
        if state:
            moments, cells = state[: -self.layers * per_layer], state[-self.layers * per_layer :]
        else:
            moments = initial_state(self.preprocessing, gradient)
            cells = (None,) * (self.layers * per_layer)
        features, kept = preprocess(self.preprocessing, gradient, moments)
        signal = ops.concatenate([ops.reshape(f, (1, -1)) for f in features], axis=0)
        state = [*kept]
        for i in range(self.layers):
            hidden, *memory = cells[i * per_layer : (i + 1) * per_layer]
            drives = self._drives(i, signal, hidden)
            if self.cell == "lstm":
                signal, *memory = _lstm(drives, *memory)
            else:
                signal = ops.tanh(drives[0])
            state += [signal, *memory]
        (step,) = backend.mix(self.output_kernel, signal)
        if self.output_bias is not None:
            step = step + self.output_bias
        if self._bounded:
            step = ops.tanh(step)
        return ops.reshape(step, ops.shape(gradient)), tuple(state)

    def _drives(self, i, signal, hidden):
        """What goes into the gates of cell ``i``: (H, N * pixels) each."""
        kernel, seen = self.kernels[i], signal
        if hidden is not None:
            kernel = ops.concatenate([kernel, self.recurrent_kernels[i]], axis=1)
            seen = ops.concatenate([seen, hidden], axis=0)
        drives = backend.mix(kernel, seen, kernel.shape[0] // self.hidden)
        if self.use_bias:
            biases = ops.split(self.biases[i], len(drives), axis=0)
            drives = [drive + bias for drive, bias in zip(drives, biases, strict=True)]
        return drives

    def penalty(self, step):
        """What training subtracts from the objective for a step (N, H, W, C): nothing."""
        return 0.0

    def describe(self):
        """Plain facts for reports."""
        keys = ("cell", "hidden", "layers", "preprocessing", "output", "use_bias")
        config = self.get_config()
        return {**{key: config[key] for key in keys}, "parameters": self.count_params()}

    def get_config(self):
        return {
            **super().get_config(),
            "cell": self.cell,
            "hidden": self.hidden,
            "layers": self.layers,
            "preprocessing": self.preprocessing,
            "output": self.output_activation,
            "scale": self.scale,
            "use_bias": self.use_bias,
            "initial_step": self.initial_step,
            "seed": self.seed,
            "trained_for": self.trained_for,
        }


def _lstm(drives, memory):
    i, f, o, a = drives
    written = ops.sigmoid(i) * backend.tanh(a)
    memory = written if memory is None else ops.sigmoid(f) * memory + written
    return ops.sigmoid(o) * backend.tanh(memory), memory


def _first_output(cell, drive):
    """NumPy: the output of a cell at rest for the pre-activation ``drive``."""
    if cell == "rnn":
        return np.tanh(drive)
    i, _, o, a = np.split(drive, 4)
    memory = np.tanh(a) / (1 + np.exp(-i))
    return np.tanh(memory) / (1 + np.exp(-o))
