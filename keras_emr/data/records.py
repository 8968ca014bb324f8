"""Random access to the records of a prepared TFDS split, without TensorFlow."""

from __future__ import annotations

import functools
import os
import struct
from collections.abc import Callable

import numpy as np

from keras_emr.errors import UserError

_HEADER = 12  # length (8 bytes) and its checksum
_FOOTER = 4

ReadRecords = Callable[[np.ndarray], list[bytes]]


def open_records(file_format: str, shards: list) -> tuple[ReadRecords, int]:
    """A function from indices (n,) to records, and the number of records.

    Args:
        file_format: ``array_record`` or ``tfrecord``.
        shards: what TFDS calls file instructions: ``filename``, ``skip``, ``take``.

    Raises:
        UserError: another format, or a damaged file.
    """
    if file_format not in _OPENERS:
        raise UserError(
            f"tfds: file format cannot be read. Received: {file_format!r}. Expected array_record or"
            " tfrecord: prepare it again in one of them."
        )

    def guarded(function, *arguments):
        try:
            return function(*arguments)
        except UserError:
            raise
        except Exception as error:  # a damaged file can fail in any way
            raise damaged(str(shards[0].filename), error) from None

    read, count = guarded(_OPENERS[file_format], shards)
    return functools.partial(guarded, read), count


def damaged(name: str, error: BaseException | str) -> UserError:
    """The error for a file or data set that cannot be read."""
    reason = " ".join(str(error).split())[:200] or type(error).__name__
    return UserError(
        f"tfds: records cannot be read: {reason}. Received: {name!r}. Prepare the data set again."
    )


def _array_records(shards):
    from array_record.python.array_record_data_source import ArrayRecordDataSource

    source = ArrayRecordDataSource(shards)
    return lambda index: list(source.__getitems__([int(i) for i in index])), len(source)


def _tf_records(shards):
    """An index of where each record lies, made by reading the lengths alone."""
    files, places = [], []
    for number, shard in enumerate(shards):
        name = os.fspath(shard.filename)
        files.append(name)
        found = _places(name)
        take = shard.take if shard.take >= 0 else len(found)
        found = found[shard.skip : shard.skip + take]
        if len(found) < take:
            raise damaged(name, f"{len(found)} records where {take} should be")
        places.append(np.insert(found, 0, number, axis=1))
    places = np.concatenate(places)

    def read(index):
        handles, records = {}, []
        try:
            for number, offset, length in places[index].tolist():
                if number not in handles:
                    handles[number] = os.open(files[number], os.O_RDONLY)
                records.append(os.pread(handles[number], length, offset))
        finally:
            for handle in handles.values():
                os.close(handle)
        return records

    return read, len(places)


def _places(name: str) -> np.ndarray:
    """Offset and length of every record of a file: int64 (n, 2)."""
    size, offset, found = os.path.getsize(name), 0, []
    with open(name, "rb") as file:
        while offset < size:
            file.seek(offset)
            header = file.read(_HEADER)
            end = size
            if len(header) == _HEADER:
                (length,) = struct.unpack("<Q", header[:8])
                found.append((offset + _HEADER, length))
                end = offset + _HEADER + length + _FOOTER
            if len(header) < _HEADER or end > size:
                raise damaged(name, "the file ends inside a record")
            offset = end
    return np.array(found, np.int64).reshape(-1, 2)


_OPENERS = {"array_record": _array_records, "tfrecord": _tf_records}
