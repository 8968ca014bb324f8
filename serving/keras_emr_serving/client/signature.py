"""What a served model says about itself."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

# Those that keras_emr's own models use first; others come as NumPy finds fit.
_DTYPES = {
    "DT_FLOAT": np.float32,
    "DT_INT64": np.int64,
    "DT_BOOL": np.bool_,
    "DT_STRING": np.object_,
    "DT_DOUBLE": np.float64,
    "DT_INT32": np.int32,
    "DT_INT16": np.int16,
    "DT_INT8": np.int8,
    "DT_UINT8": np.uint8,
    "DT_UINT16": np.uint16,
    "DT_UINT32": np.uint32,
    "DT_UINT64": np.uint64,
    "DT_HALF": np.float16,
}


@dataclass(frozen=True)
class Tensor:
    """``dtype`` as TensorFlow writes it, ``DT_FLOAT``. ``shape``: ``None`` where a side is free."""

    dtype: str
    shape: tuple[int | None, ...] | None

    @property
    def numpy(self):
        """NumPy's type, or ``None`` for one that it has not."""
        return _DTYPES.get(self.dtype)


@dataclass(frozen=True)
class Signature:
    """One function of a model: ``inputs`` and ``outputs`` by name."""

    method: str
    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]


@dataclass(frozen=True)
class Metadata:
    """A loaded version of a model."""

    name: str
    version: int
    signatures: dict[str, Signature]


@dataclass(frozen=True)
class VersionStatus:
    """``state``: START, LOADING, AVAILABLE, UNLOADING or END. ``error``: text, empty if none."""

    version: int
    state: str
    error: str


def sides(sizes, unknown_rank=False):
    """The shape that the sizes -1, 28, 28 mean: ``(None, 28, 28)``."""
    return None if unknown_rank else tuple(None if s < 0 else s for s in map(int, sizes))
