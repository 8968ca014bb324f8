"""What a training step compiles and transfers, by each backend's own counters.

``watch()`` is a callback for ``fit``; after it, ``compiled`` is the number of programs behind the
training step after each step, ``anything`` that of all programs of the process (at the same
moments, and after each epoch in ``epochs``), and ``transfers`` names what passed between host and
device inside a step, the batch itself apart.
"""

import inspect
import traceback

import keras

BACKEND = keras.backend.backend()


class _Watch(keras.callbacks.Callback):
    def __init__(self):
        super().__init__()
        self.compiled, self.anything, self.epochs, self.transfers = [], [], [], []

    def on_train_begin(self, logs=None):
        self._step = self.model.train_function
        self.model.train_function = self._watched()

    def on_train_batch_end(self, batch, logs=None):
        self.compiled.append(self._count())
        self.anything.append(self._count_all())

    def on_epoch_end(self, epoch, logs=None):
        self.epochs.append(self._count_all())

    @property
    def late(self):
        """Programs that came after the second step, and after the first epoch's end."""
        first = len(self.compiled) // len(self.epochs)
        return {
            "training step": self.compiled[-1] - self.compiled[1],
            "first epoch": self.anything[first - 1] - self.anything[1],
            "later epochs": self.epochs[-1] - self.epochs[0],
        }


def _inner(function, name):
    """The compiled function that Keras's ``train_function`` closes over."""
    return inspect.getclosurevars(function).nonlocals[name]


class JaxWatch(_Watch):
    """The jit cache, jax's compile events, its transfer guard, and callbacks in the program."""

    _events = 0

    def _watched(self):
        import jax

        _listen()
        self._jit = _inner(self._step, "step_function")

        def guarded(state, iterator):
            data = jax.device_put(next(iterator))
            if len(self.compiled) < 2:  # the constants of a program travel when it is compiled
                found = str(self._jit.trace(state, data).jaxpr) if not self.compiled else ""
                self.transfers += ["callback"] * found.count("callback[")
                return self._jit(state, data)
            try:
                with jax.transfer_guard("disallow"):
                    return self._jit(state, data)
            except Exception as error:
                if "transfer" not in str(error):
                    raise
                self.transfers.append(str(error))
                return self._jit(state, data)

        return guarded

    def _count(self):
        return self._jit._cache_size()

    def _count_all(self):
        return JaxWatch._events


def _listen():
    import jax

    if getattr(_listen, "done", False):
        return
    _listen.done = True

    def count(event, seconds, **more):
        if event == "/jax/core/compile/backend_compile_duration":
            JaxWatch._events += 1

    jax.monitoring.register_event_duration_secs_listener(count)


class TensorFlowWatch(_Watch):
    """Traces of the step, functions that the runtime knows, and Python within the graph."""

    def _watched(self):
        self._function, self._names = _inner(self._step, "multi_step_on_iterator"), set()
        return self._step

    def _count(self):
        return self._function.experimental_get_tracing_count()

    def _count_all(self):
        from tensorflow.python.eager import context

        # By name: those of models that are gone are dropped at any time.
        self._names |= set(context.context().list_function_names())
        return len(self._names)

    def on_train_end(self, logs=None):
        for function in self._function._list_all_concrete_functions():
            definition = function.graph.as_graph_def()
            operations = [node.op for node in definition.node]
            operations += [n.op for f in definition.library.function for n in f.node_def]
            assert any("Conv2DBackpropInput" in op for op in operations)  # the attack is in it
            self.transfers += [
                op for op in operations if "PyFunc" in op or op in ("Print", "PrintV2")
            ]


class TorchWatch(_Watch):
    """Every value that is read back, and every upload, with the place that asks for it.

    Keras on torch is not free of either: each draw of noise reads its seed, and its metrics,
    reductions and optimizers make a tensor of a number a few times a step. ``transfers`` has what
    is not of these; ``uploads`` counts all of the last step, which must not grow with the attack.
    """

    uploads = 0
    READS = ("item", "tolist", "numpy", "cpu", "nonzero", "masked_select", "unique")
    READS += ("__bool__", "__float__", "__int__", "__index__", "__array__")

    def _watched(self):
        from torch.overrides import TorchFunctionMode

        watch = self

        class Seen(TorchFunctionMode):
            def __torch_function__(self, function, types, args=(), kwargs=None):
                name = getattr(function, "__name__", "")
                if name in watch.READS and not _draws_a_seed():
                    watch.transfers.append(f"{name} at {_place()}")
                if name in ("as_tensor", "tensor", "from_numpy"):
                    watch.uploads += 1
                return function(*args, **(kwargs or {}))

        def seen(data):
            self.uploads = 0
            with Seen():
                return self._step(_on_device(data))

        return seen

    def _count(self):
        return 1  # it compiles nothing

    _count_all = _count


def _on_device(data):
    return keras.tree.map_structure(keras.ops.convert_to_tensor, data)


def _frames():
    return [(frame.filename, frame.lineno) for frame in traceback.extract_stack()]


def _draws_a_seed():
    return any(
        name.replace("\\", "/").endswith("keras/src/backend/torch/random.py")
        for name, _ in _frames()
    )


def _place():
    """The innermost line of the library, or of Keras."""
    found = [f for f in _frames() if "keras_emr" in f[0] or "keras/src" in f[0]]
    return "{}:{}".format(*found[-1]) if found else "?"


def watch():
    """A new watch of this backend."""
    return {"jax": JaxWatch, "tensorflow": TensorFlowWatch, "torch": TorchWatch}[BACKEND]()
