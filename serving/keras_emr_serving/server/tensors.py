"""Arrays and ``TensorProto``, guarded against shapes that no memory could hold."""

from __future__ import annotations

import math

import numpy as np

from keras_emr_serving.server.status import invalid

_MAX_REPEATED = 2**24  # elements of a tensor of which fewer are sent
_MAX_RANK = 64
_FIELDS = {
    "float32": "float_val",
    "float64": "double_val",
    "int64": "int64_val",
    "bool": "bool_val",
    "uint32": "uint32_val",
    "uint64": "uint64_val",
    **dict.fromkeys(("int8", "int16", "int32", "uint8", "uint16"), "int_val"),
}


def to_array(tensor) -> np.ndarray:
    """The array in a ``TensorProto``; too few values repeat the last one.

    Raises ``INVALID_ARGUMENT`` when the message holds no tensor.
    """
    from tensorflow import make_ndarray

    sizes = [dim.size for dim in tensor.tensor_shape.dim]
    try:
        if min(sizes, default=0) < 0 or len(sizes) > _MAX_RANK:
            raise ValueError("shape")
        # What is sent in full is as large as its message; a repeated value may be of any size.
        if math.prod(sizes) > max(_MAX_REPEATED, tensor.ByteSize()):
            raise ValueError("size")
        return make_ndarray(tensor)
    except Exception:
        shape = ",".join(map(str, sizes))
        raise invalid(
            f"tensor parsing error: dtype {tensor.dtype}, shape [{shape}], "
            f"{len(tensor.tensor_content)} bytes of content"
        ) from None


def to_proto(array: np.ndarray, tensor) -> None:
    """Write ``array`` into a ``TensorProto``, value by value as TF Serving does, so that clients
    may read ``float_val`` and its like."""
    from tensorflow import dtypes, make_tensor_proto

    field = _FIELDS.get(array.dtype.name)
    if array.dtype.hasobject:
        tensor.dtype = dtypes.string.as_datatype_enum
        tensor.string_val.extend(array.reshape(-1).tolist())
    elif field:
        tensor.dtype = dtypes.as_dtype(array.dtype).as_datatype_enum
        getattr(tensor, field).extend(array.reshape(-1).tolist())
    else:  # half, bfloat16 and other rare types
        tensor.CopyFrom(make_tensor_proto(array))
    del tensor.tensor_shape.dim[:]
    for size in array.shape:
        tensor.tensor_shape.dim.add(size=size)
