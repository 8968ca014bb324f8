"""Prometheus metrics under TensorFlow Serving's names."""

from __future__ import annotations

import threading
from collections import Counter

from prometheus_client import CollectorRegistry, Histogram, generate_latest
from prometheus_client.metrics_core import Metric

CONTENT_TYPE = "text/plain"
_PREFIX = ":tensorflow:serving:"
_MICROSECONDS = [10 * 1.8**i for i in range(33)]
_COUNTERS = {
    f"{_PREFIX}request_count": ("The total number of requests.", ("model_name", "status")),
    f"{_PREFIX}request_example_count_total": (
        "The total number of tensorflow.Examples.",
        ("model",),
    ),
    ":tensorflow:cc:saved_model:load_attempt_count": (
        "The number of times a SavedModel was requested to be loaded.",
        ("model_path", "status"),
    ),
}


class Metrics:
    """What one server counts. Thread-safe."""

    def __init__(self):
        self._counts = Counter()
        self._lock = threading.Lock()
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(self)
        self.request_latency = self._histogram(
            "request_latency",
            "Distribution of wall time (in microseconds) for Tensorflow Serving request.",
            ("model_name", "API", "entrypoint"),
            _MICROSECONDS,
        )
        self.runtime_latency = self._histogram(
            "runtime_latency",
            "Distribution of wall time (in microseconds) for Tensorflow runtime.",
            ("model_name", "API", "runtime"),
            _MICROSECONDS,
        )
        self.example_counts = self._histogram(
            "request_example_counts",
            "The number of tensorflow.Examples per request.",
            ("model",),
            [2**i for i in range(15)],
        )
        self.warmup_latency = self._histogram(
            "model_warmup_latency",
            "Distribution of wall time (in microseconds) for warming up the model.",
            ("model_path", "status"),
            _MICROSECONDS,
        )

    def _histogram(self, name, text, labels, buckets):
        return Histogram(_PREFIX + name, text, labels, registry=self._registry, buckets=buckets)

    def request(self, model: str, api: str, entrypoint: str, status: str, microseconds: float):
        """Count one request, whatever became of it."""
        self._add(f"{_PREFIX}request_count", model, status)
        self.request_latency.labels(model, api, entrypoint).observe(microseconds)

    def examples(self, model: str, count: int):
        self.example_counts.labels(model).observe(count)
        self._add(f"{_PREFIX}request_example_count_total", model, amount=count)

    def load(self, path, status: str):
        """Count an attempt to load the version in ``path``: ``"success"`` or ``"fail"``."""
        self._add(":tensorflow:cc:saved_model:load_attempt_count", str(path), status)

    def _add(self, name, *labels, amount=1):
        with self._lock:
            self._counts[name, labels] += amount

    def collect(self):
        with self._lock:
            counts = list(self._counts.items())
        for name, (text, labels) in _COUNTERS.items():
            metric = Metric(name, text, "untyped")
            for (counted, values), count in counts:
                if counted == name:
                    metric.add_sample(name, dict(zip(labels, values, strict=True)), count)
            yield metric

    def text(self) -> bytes:
        """The page that Prometheus reads."""
        page = generate_latest(self._registry).decode()
        for name in _COUNTERS:  # the library would end every counter in _total; TF Serving doesn't
            page = page.replace(f"# TYPE {name} untyped", f"# TYPE {name} counter")
        lines = [line for line in page.splitlines(True) if "_created" not in line.split("{")[0]]
        return "".join(lines).encode()
