"""Results over REST: arrays to the JSON text that TensorFlow Serving writes."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence

import numpy as np

from keras_emr_serving.server.json_text import decimal, quote
from keras_emr_serving.server.status import invalid

_STEP = "    "


def error_text(message: str) -> str:
    return f'{{\n{_STEP}"error": {quote(message)}\n}}'


def write_rows(outputs: Mapping[str, np.ndarray]) -> str:
    """``{"predictions": [...]}``: one item per row; an object per row if there are many outputs.

    Raises:
        ServingError: an output has no batch, or another batch than the first, or a type that JSON
            cannot hold.
    """
    size = None
    for name, array in outputs.items():
        if array.ndim == 0:
            raise invalid(f"Tensor name: {name} has no shape information ")
        if size not in (None, len(array)):
            raise invalid(
                f"Tensor name: {name} has inconsistent batch size: {len(array)} expecting: {size}"
            )
        size = len(array)
    cells = {name: _Cells(name, array, array.shape[1:]) for name, array in outputs.items()}
    if len(cells) == 1:
        (only,) = cells.values()
        items = [only.line(i, 2) for i in range(size)]
        return _wrap("predictions", f"[{', '.join(items)}{_line(1) if items else ''}]")
    rows = []
    for i in range(size):
        pairs = [f"{quote(name)}: {one.line(i, 3)}" for name, one in cells.items()]
        rows.append(f"{_line(2)}{{{','.join(_line(3) + pair for pair in pairs)}{_line(2)}}}")
    return _wrap("predictions", f"[{','.join(rows)}{_line(1) if rows else ''}]")


def write_columns(outputs: Mapping[str, np.ndarray]) -> str:
    """``{"outputs": ...}``: the only output, or an object of all. Scalars are allowed."""
    texts = {name: _Cells(name, a, a.shape) for name, a in outputs.items()}
    if len(texts) == 1:
        (only,) = texts.values()
        return _wrap("outputs", only.block(1))
    pairs = [f"{_line(2)}{quote(name)}: {one.block(2)}" for name, one in texts.items()]
    return _wrap("outputs", f"{{{','.join(pairs)}{_line(1)}}}")


def write_classes(results: Sequence[Sequence[tuple[bytes, float]]]) -> str:
    """``{"results": [[["label", score], ...], ...]}``."""
    rows = [
        f"[{', '.join(f'[{_string(label)}, {decimal(score)}]' for label, score in row)}]"
        for row in results
    ]
    return _wrap("results", f"[{', '.join(rows)}{_line(1)}]")


def write_values(values: Sequence[float]) -> str:
    """``{"results": [value, ...]}``."""
    return _wrap("results", f"[{', '.join(map(decimal, values))}]")


def _wrap(key, text):
    return f"{{{_line(1)}{quote(key)}: {text}\n}}"


def _line(level):
    return "\n" + _STEP * level


def _string(value):
    # Bytes that are no UTF-8 go out as they came in, as the real server writes them.
    return quote(value.decode(errors="surrogateescape"))


class _Cells:
    """The scalars of an array as text, and their layouts."""

    def __init__(self, name, array, shape):
        self.shape = shape
        self.per_item = int(np.prod(shape, dtype=np.int64))
        self.is_bytes = array.dtype == object and name.endswith("_bytes")
        self.texts = _scalars(array, self.is_bytes)

    def line(self, item, level):
        """Item ``item`` of the batch, on one line."""
        return self._nested(item * self.per_item, 0, level, False)

    def block(self, level):
        """Everything, one scalar per line."""
        return self._nested(0, 0, level, True)

    def _nested(self, start, axis, level, tall):
        if axis == len(self.shape):
            text = self.texts[start]
            if not self.is_bytes:
                return text
            return f'{{{_line(level + 1)}"b64": {text}{_line(level)}}}'
        count = self.shape[axis]
        if not count:
            return "[]"
        step = int(np.prod(self.shape[axis + 1 :], dtype=np.int64))
        if axis == len(self.shape) - 1 and not self.is_bytes:
            items = self.texts[start : start + count]
        else:
            items = [
                self._nested(start + i * step, axis + 1, level + 1, tall) for i in range(count)
            ]
        if not tall:
            return f"[{', '.join(items)}]"
        inner = _line(level + 1)
        return f"[{inner}{(',' + inner).join(items)}{_line(level)}]"


def _scalars(array, as_base64):
    values = array.reshape(-1)
    kind = array.dtype
    if kind.hasobject:
        if as_base64:
            return [quote(base64.b64encode(value).decode()) for value in values]
        return [_string(value) for value in values]
    if kind == np.float32:
        return [decimal(value) for value in values.tolist()]
    if kind == np.float64:
        return [decimal(value, 17) for value in values.tolist()]
    if kind == np.bool_:
        return ["true" if value else "false" for value in values.tolist()]
    if kind.name in ("int8", "int16", "int32", "int64", "uint8", "uint32", "uint64"):
        return [str(value) for value in values.tolist()]
    raise invalid(f"Failed to write JSON value for tensor type: {_tensorflow_name(kind)}")


def _tensorflow_name(kind):
    return {"float16": "half"}.get(kind.name, kind.name)
