"""Prepare the next batches while the present one is trained on."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Lock

# More than one, for while one waits for the disk another can decode.
_THREADS = 2


class ReadAhead:
    """Makes things in threads, before they are asked for, and hands them out by their keys.

    Unlike Keras's own queue it holds no order: whatever is asked for is what is given, after a
    batch that was only looked at, an epoch that was broken off or a jump alike.
    """

    def __init__(self):
        self._pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="read-ahead")
        self._made: dict[Hashable, Future] = {}
        self._lock = Lock()

    def get(self, keys: Sequence[Hashable], make: Callable):
        """``make(keys[0])``; those of the other keys are begun, what else was begun is dropped."""
        with self._lock:
            for key in set(self._made) - set(keys):
                self._made.pop(key).cancel()
            for key in keys:
                if key not in self._made:
                    self._made[key] = self._pool.submit(make, key)
            wanted = self._made.pop(keys[0])
        return wanted.result()
