"""Dynamic batching: requests that come close together run as one, in a bounded queue."""

from __future__ import annotations

import threading
import time
from collections import deque
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import dataclass, field

import numpy as np

from keras_emr_serving.server.status import ServingError, from_exception, invalid
from keras_emr_serving.server.text_protos import Batching


@dataclass
class _Task:
    feeds: list
    size: int
    since: float
    end: float | None = None  # when nobody waits for it any more
    done: Future = field(default_factory=Future)


class _Queue:
    def __init__(self, names, fetches):
        self.names, self.fetches = names, fetches
        self.tasks: deque[_Task] = deque()
        self.rows = 0


class Batcher:
    """Runs a servable in batches. :meth:`run` has the servable's own signature.

    A queue for each signature; ``settings.threads`` threads take batches from all of them.
    """

    def __init__(self, servable, settings: Batching):
        self._servable, self._settings = servable, settings
        self._queues: dict[tuple, _Queue] = {}
        self._changed = threading.Condition()
        self._stopped = False
        self._threads = [
            threading.Thread(target=self._work, daemon=True, name="batch")
            for _ in range(settings.threads)
        ]
        for thread in self._threads:
            thread.start()

    def stop(self):
        """Finish what is queued, then end the threads."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()

    def run(self, feeds, fetches, timeout_ms=None, infos=None):
        """As :meth:`Servable.run`. Raises ``UNAVAILABLE`` when the queue is full."""
        feeds, wanted = sorted(feeds, key=lambda one: one[0]), sorted(set(fetches))
        self._servable.check(feeds, infos)
        size = _size(feeds)
        limit = self._settings.max_batch_size
        if size > limit:
            raise invalid(f"Task size {size} is larger than maximum input batch size {limit}")
        now = time.monotonic()
        task = _Task(feeds, size, now, now + timeout_ms / 1000 if timeout_ms else None)
        key = (tuple(name for name, _ in feeds), tuple(wanted))
        with self._changed:
            if self._stopped:
                raise ServingError("UNAVAILABLE", "This model version is being unloaded")
            queue = self._queues.get(key)
            if queue is None:
                queue = self._queues[key] = _Queue(*key)
            if queue.rows + size > limit * self._settings.max_enqueued_batches:
                raise ServingError(
                    "UNAVAILABLE",
                    "The batch scheduling queue to which this task was submitted is full",
                )
            queue.tasks.append(task)
            queue.rows += size
            self._changed.notify()
        try:
            values, elapsed = task.done.result(timeout_ms / 1000 if timeout_ms else None)
        except FutureTimeout:
            task.done.cancel()
            raise ServingError("DEADLINE_EXCEEDED", "Timed out in the batching queue") from None
        by_name = dict(zip(wanted, values, strict=True))
        return [by_name[name] for name in fetches], elapsed

    def _work(self):
        while True:
            with self._changed:
                queue, tasks = self._next()
            if queue is None:
                return
            tasks = [task for task in tasks if task.done.set_running_or_notify_cancel()]
            if not tasks:
                continue
            try:
                results = self._run_batch(queue, tasks)
            except Exception as error:
                for task in tasks:
                    task.done.set_exception(from_exception(error))
            else:
                for task, result in zip(tasks, results, strict=True):
                    task.done.set_result(result)

    def _next(self):
        """The queue whose oldest task has waited longest, once a batch of it is due."""
        while True:
            waiting = [queue for queue in self._queues.values() if queue.tasks]
            now = time.monotonic()
            due = [queue for queue in waiting if self._due(queue, now)]
            if due:
                queue = min(due, key=lambda one: one.tasks[0].since)
                return queue, self._take(queue)
            if self._stopped:
                return None, []
            wait = None
            if waiting:
                oldest = min(queue.tasks[0].since for queue in waiting)
                wait = max(0.0, oldest + self._settings.timeout_seconds - now)
            self._changed.wait(wait)

    def _due(self, queue, now):
        full = queue.rows >= self._settings.max_batch_size
        old = now - queue.tasks[0].since >= self._settings.timeout_seconds
        return full or old or self._stopped

    def _take(self, queue):
        taken, rows = [], 0
        while queue.tasks and rows + queue.tasks[0].size <= self._settings.max_batch_size:
            taken.append(queue.tasks.popleft())
            rows += taken[-1].size
        queue.rows -= rows
        return taken

    def _run_batch(self, queue, tasks):
        rows = sum(task.size for task in tasks)
        total = next((n for n in self._settings.allowed_sizes if n >= rows), rows)
        feeds = [
            (name, self._join(name, [task.feeds[i][1] for task in tasks], total - rows))
            for i, name in enumerate(queue.names)
        ]
        values, elapsed = self._servable.run(feeds, queue.fetches, _longest(tasks))
        for value in values:
            _require_batch(value, total)
        results, start = [], 0
        for task in tasks:
            end = start + task.size
            results.append(([value[start:end] for value in values], elapsed))
            start = end
        return results

    def _join(self, name, arrays, padding):
        shapes = {array.shape[1:] for array in arrays}
        if len(shapes) > 1:
            if not self._settings.pad_inputs or len({len(shape) for shape in shapes}) > 1:
                raise ServingError(
                    "FAILED_PRECONDITION",
                    f"Tensors with name '{name}' from different tasks have different shapes and "
                    "padding is turned off. Set pad_variable_length_inputs to true, or ensure that "
                    "all tensors with the same name have equal dimensions starting with the first "
                    "dim.",
                )
            arrays = _pad(arrays, np.max([list(shape) for shape in shapes], axis=0))
        if padding:
            arrays = [*arrays, np.repeat(arrays[0][:1], padding, axis=0)]
        return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)


def _longest(tasks):
    """Milliseconds until the last of them is given up; ``None``: never."""
    if any(task.end is None for task in tasks):
        return None
    return max(1, int((max(task.end for task in tasks) - time.monotonic()) * 1000))


def _size(feeds):
    sizes = set()
    for _, array in feeds:
        if array.ndim == 0:
            raise invalid("Batching session Run() input tensors must have at least one dimension.")
        sizes.add(len(array))
    if len(sizes) > 1:
        raise invalid("Batching session Run() input tensors must have equal 0th-dimension size.")
    size = sizes.pop() if sizes else 0
    if not size:
        raise invalid("Batching Run() input tensors must have non-zero 0th-dimension size.")
    return size


def _pad(arrays, shape):
    """Grow every array to ``shape`` after the batch, with its first element."""
    grown = []
    for array in arrays:
        fill = array.flat[0] if array.size else b"" if array.dtype == object else 0
        large = np.full((len(array), *shape), fill, array.dtype)
        large[tuple(slice(n) for n in array.shape)] = array
        grown.append(large)
    return grown


def _require_batch(value, total):
    if value.ndim == 0:
        raise ServingError("FAILED_PRECONDITION", "Batched output tensor has 0 dimensions")
    if len(value) != total:
        raise ServingError(
            "FAILED_PRECONDITION",
            "Batched output tensor's 0th dimension does not equal the sum of the 0th dimension "
            "sizes of the input tensors",
        )
