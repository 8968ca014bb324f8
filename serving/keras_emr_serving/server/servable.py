"""One loaded SavedModel, run through the TF1 Session as TensorFlow Serving does."""

from __future__ import annotations

import ctypes
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from keras_emr_serving.server.status import from_exception, invalid

DEFAULT_SIGNATURE = "serving_default"
# With oneDNN these end the whole process when a tensor has a rank they do not expect.
_ABORTING = re.compile(r"Conv|Pool|BatchNorm|LRN|BiasAdd")


def disable_xla() -> bool:
    """Refuse XLA in this process, as TF Serving does at its start. False: cannot be done here."""
    import tensorflow as tf

    library = Path(tf.sysconfig.get_lib()) / "libtensorflow_cc.so.2"
    try:
        ctypes.CDLL(str(library))._ZN10tensorflow21DisableXlaCompilationEv()
    except (OSError, AttributeError):
        return False
    return True


class Servable:
    """A model version in memory.

    ``signatures``: name -> ``SignatureDef``. Runs are thread-safe. Raises what TensorFlow raises
    when the folder does not hold a model that can be loaded.
    """

    def __init__(self, path: str | Path):
        import tensorflow as tf

        self.path = Path(path)
        self._tf = tf
        self._graph = tf.Graph()
        config = tf.compat.v1.ConfigProto(allow_soft_placement=True)
        with self._graph.as_default():
            self._session = tf.compat.v1.Session(graph=self._graph, config=config)
            try:
                loaded = tf.compat.v1.saved_model.load(self._session, ["serve"], str(path))
            except BaseException:
                self._session.close()
                raise
        self.signatures = dict(loaded.signature_def)
        self._shapes_matter = _may_abort(loaded.graph_def)
        self._outputs: dict[str, object] = {}

    def close(self):
        self._session.close()

    def types(self, signature) -> dict[str, str]:
        """Input name -> TensorFlow's name of its type (``"float"``, ``"int64"``, ...)."""
        return {name: self._type_name(info.dtype) for name, info in signature.inputs.items()}

    def _type_name(self, dtype):
        name = self._tf.dtypes.as_dtype(dtype).name
        return {"float32": "float", "float64": "double", "float16": "half"}.get(name, name)

    def run(
        self,
        feeds: Sequence[tuple[str, np.ndarray]],
        fetches: Sequence[str],
        timeout_ms: int | None = None,
        infos: Mapping[str, object] | None = None,
    ) -> tuple[list[np.ndarray], float]:
        """Values of ``fetches``, and how many microseconds they took.

        Args:
            feeds: (tensor name, array) pairs; types must be those of the graph.
            fetches: tensor names.
            timeout_ms: after which the run is given up (``DEADLINE_EXCEEDED``).
            infos: tensor name -> its ``TensorInfo``, to check shapes where the graph would abort.
        """
        self.check(feeds, infos)
        # In one order, or every order that clients ask for would cost a plan of its own.
        unique = sorted(set(fetches))
        start = time.perf_counter()
        try:
            values = self._call(feeds, unique, timeout_ms)
        except Exception as error:
            raise from_exception(error) from error
        elapsed = (time.perf_counter() - start) * 1e6
        by_name = dict(zip(unique, values, strict=True))
        return [_array(by_name[name]) for name in fetches], elapsed

    def _call(self, feeds, fetches, timeout_ms):
        # Session.run and make_callable compare shapes first and fail in other words than the C++
        # session, which is what TF Serving calls; this goes straight to it. The session's plan for
        # these tensors is made once, whatever the timeout.
        from tensorflow.python.client import pywrap_tf_session as raw

        options = None
        if timeout_ms:
            message = self._tf.compat.v1.RunOptions(timeout_in_ms=timeout_ms)
            options = raw.TF_NewBufferFromString(message.SerializeToString())
        try:
            given = {self._output(name): array for name, array in feeds}
            wanted = [self._output(name) for name in fetches]
            return raw.TF_SessionRun_wrapper(
                self._session._session, options, given, wanted, [], None
            )
        finally:
            if options is not None:
                raw.TF_DeleteBuffer(options)

    def _output(self, name):
        found = self._outputs.get(name)
        if found is None:
            found = self._graph.get_tensor_by_name(name)._as_tf_output()
            self._outputs[name] = found
        return found

    def check(self, feeds, infos) -> None:
        """Raises ``INVALID_ARGUMENT`` for arrays that the graph must not be given."""
        for index, (name, array) in enumerate(feeds):
            if infos and name in infos:
                self._check(index, array, infos[name])

    def _check(self, index, array, info):
        given = self._tf.string if array.dtype == object else self._tf.dtypes.as_dtype(array.dtype)
        wanted = self._tf.dtypes.as_dtype(info.dtype)
        if given != wanted:
            raise invalid(
                f"Expects arg[{index}] to be {self._type_name(wanted)} but "
                f"{self._type_name(given)} is provided"
            )
        if not self._shapes_matter or info.tensor_shape.unknown_rank:
            return
        dims = [dim.size for dim in info.tensor_shape.dim]
        fits = len(dims) == array.ndim and all(
            want in (-1, got) for want, got in zip(dims, array.shape, strict=True)
        )
        if not fits:
            shape = ",".join(map(str, array.shape))
            expected = ",".join("?" if dim == -1 else str(dim) for dim in dims)
            raise invalid(
                f"Shape of tensor {info.name.split(':')[0]} [{shape}] is not compatible with "
                f"expected shape [{expected}]."
            )


def _array(value):
    # A string scalar comes as bytes, whose NumPy type would cut zeros off its end.
    return np.array(value, object) if isinstance(value, bytes) else np.asarray(value)


def _may_abort(graph):
    nodes = [*graph.node, *(n for f in graph.library.function for n in f.node_def)]
    return any(_ABORTING.search(node.op) for node in nodes)
