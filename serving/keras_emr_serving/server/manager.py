"""Which versions of which models are loaded, and the switch from one to the next."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from keras_emr_serving.server.config import ModelConfig, aspired
from keras_emr_serving.server.metrics import Metrics
from keras_emr_serving.server.status import ServingError, invalid
from keras_emr_serving.server.version import Version, fingerprint, load

log = logging.getLogger("keras_emr_serving")
LIVE = ("START", "LOADING", "AVAILABLE")
DRAIN_SECONDS = 60


@dataclass
class _Entry:
    config: ModelConfig
    versions: dict[int, Version] = field(default_factory=dict)
    removed: bool = False
    trouble: str = ""


class Manager:
    """Loads what the configured policies ask for and unloads the rest.

    Args:
        models: what to serve.
        metrics: where loads and run times are counted.
        batcher: wraps a servable's ``run`` and returns ``(run, stop)``; ``None``: no batching.
        early_labels: whether a new label may name a version that is not available.
    """

    def __init__(
        self,
        models: Iterable[ModelConfig],
        metrics: Metrics,
        batcher: Callable | None = None,
        early_labels: bool = False,
    ):
        self._entries = {one.name: _Entry(one) for one in models}
        self._metrics, self._batcher = metrics, batcher
        self._early_labels = early_labels
        self._labels: dict[str, dict[str, int]] = {}
        self._lock = threading.Condition()
        self._polling = threading.Lock()

    # Looking up -----------------------------------------------------------------------------

    @contextlib.contextmanager
    def use(
        self, name: str, version: int | None = None, label: str | None = None
    ) -> Iterator[Version]:
        """A loaded version, kept loaded while in use; the latest unless one is named.

        Raises:
            ServingError: ``NOT_FOUND``, or ``INVALID_ARGUMENT`` for an unknown label.
        """
        with self._lock:
            found = self._find(name, version, label)
            found.users += 1
        try:
            yield found
        finally:
            with self._lock:
                found.users -= 1
                self._lock.notify_all()

    def _find(self, name, version, label):
        if label is not None:
            try:
                version = self._labels[name][label]
            except KeyError:
                raise invalid(f"Unrecognized servable version label: {label}") from None
        entry = self._entries.get(name)
        versions = entry.versions if entry else {}
        ready = [n for n, one in versions.items() if one.state == "AVAILABLE"]
        if version is None and ready:
            return versions[max(ready)]
        if version in ready:
            return versions[version]
        wanted = f"Latest({name})" if version is None else f"Specific({name}, {version})"
        raise ServingError("NOT_FOUND", f"Servable not found for request: {wanted}")

    def status(
        self, name: str, version: int | None = None, label: str | None = None
    ) -> list[tuple[int, str, ServingError | None]]:
        """(version, state, error) of every version ever seen, the latest first."""
        with self._lock:
            if label is not None:
                version = self._find(name, None, label).number
            versions = self._entries[name].versions if name in self._entries else {}
            if version is not None:
                if version not in versions:
                    raise ServingError(
                        "NOT_FOUND", f"Could not find version {version} of model {name}"
                    )
                versions = {version: versions[version]}
            if not versions:
                raise ServingError("NOT_FOUND", f"Could not find any versions of model {name}")
            return [(n, one.state, one.error) for n, one in sorted(versions.items(), reverse=True)]

    def unavailable(self) -> dict[str, str]:
        """Configured models with no version to serve: name -> why."""
        with self._lock:
            missing = {}
            for name, entry in self._entries.items():
                versions = entry.versions.values()
                if entry.removed or any(one.state == "AVAILABLE" for one in versions):
                    continue
                errors = [str(one.error) for one in versions if one.error]
                missing[name] = entry.trouble or "; ".join(errors) or "no version to load"
            return missing

    def serving(self) -> list[tuple[str, int]]:
        """(model, version) of everything that answers now."""
        with self._lock:
            return [
                (name, n)
                for name, entry in sorted(self._entries.items())
                for n, one in sorted(entry.versions.items())
                if one.state == "AVAILABLE"
            ]

    # Changing -------------------------------------------------------------------------------

    def reconfigure(self, models: Iterable[ModelConfig]) -> None:
        """Serve ``models`` from now on: load, switch, and only then set the labels.

        Raises:
            ServingError: a model that does not become available (``INVALID_ARGUMENT``), or a label
                for a version that is not available (``FAILED_PRECONDITION``).
        """
        models = list(models)
        with self._lock:
            names = {one.name for one in models}
            for name, entry in self._entries.items():
                entry.removed = name not in names
            for one in models:
                if one.name in self._entries:
                    self._entries[one.name].config = one
                else:
                    self._entries[one.name] = _Entry(one)
        self.poll()
        self._set_labels(models)
        missing = {k: v for k, v in self.unavailable().items() if k in names}
        if missing:
            text = ", ".join(f"{{name: {name} error: {why}}}" for name, why in missing.items())
            raise ServingError(
                "UNKNOWN", f"{len(missing)} servable(s) did not become available: {text}"
            )

    def _set_labels(self, models):
        with self._lock:
            labels = {}
            for one in models:
                for label, number in one.labels.items():
                    versions = self._entries[one.name].versions
                    ready = number in versions and versions[number].state == "AVAILABLE"
                    new = label not in self._labels.get(one.name, {})
                    if not ready and not (self._early_labels and new):
                        raise ServingError(
                            "FAILED_PRECONDITION",
                            f"Request to assign label to version {number} of model {one.name}, "
                            "which is not currently available for inference",
                        )
                labels[one.name] = dict(one.labels)
            self._labels = labels

    def start(self) -> None:
        """Load everything for the first time. Raises as :meth:`reconfigure` does for labels."""
        self.poll()
        self._set_labels([entry.config for entry in self._entries.values()])

    def poll(self) -> None:
        """Look at the folders once: load what is new, then unload what is no longer wanted."""
        with self._polling:
            with self._lock:
                entries = list(self._entries.values())
            for entry in entries:
                self._poll(entry)

    def _poll(self, entry):
        name = entry.config.name
        wanted = {}
        if not entry.removed:
            try:
                wanted = aspired(entry.config)
                entry.trouble = ""
            except OSError as error:
                trouble = f"Could not find base path {entry.config.base_path}: {error.strerror}"
                if entry.trouble != trouble:
                    log.error("model %s: %s", name, trouble)
                entry.trouble = trouble
                return  # what is loaded stays
        for number, path in sorted(wanted.items()):
            if self._should_load(entry, number, path):
                self._load(entry, number, path)
        with self._lock:
            ready = [n for n, one in entry.versions.items() if one.state == "AVAILABLE"]
            gone = [n for n in ready if n not in wanted]
            # The last version that works is kept until one that should replace it does.
            if wanted and not set(ready) & set(wanted):
                gone = []
        for number in gone:
            self._unload(entry, number)

    def _should_load(self, entry, number, path):
        known = entry.versions.get(number)
        if known is None:
            return True
        if known.state in LIVE or known.state == "UNLOADING":
            return False
        # One that failed is tried again when its files have changed.
        return known.error is None or known.fingerprint != fingerprint(path)

    def _load(self, entry, number, path):
        name = entry.config.name
        version = Version(number, path, "LOADING", fingerprint=fingerprint(path))
        with self._lock:
            entry.versions[number] = version
        log.info("model %s version %d: loading %s", name, number, path)
        try:
            loaded = load(name, path, self._metrics, self._batcher)
        except ServingError as error:
            with self._lock:
                version.state, version.error = "END", error
            log.error("model %s version %d: cannot be loaded: %s", name, number, error)
            return
        with self._lock:
            version.servable, version.model, version.stop = loaded
            version.state = "AVAILABLE"
        log.info("model %s version %d: available", name, number)

    def _unload(self, entry, number):
        version = entry.versions[number]
        with self._lock:
            version.state = "UNLOADING"
            drained = self._lock.wait_for(lambda: not version.users, timeout=DRAIN_SECONDS)
        version.stop()
        if drained:  # else it is left to whoever still holds it
            version.servable.close()
            version.servable = version.model = None
        with self._lock:
            version.state = "END"
        log.info("model %s version %d: unloaded", entry.config.name, number)

    def close(self) -> None:
        """Unload everything."""
        with self._lock:
            for entry in self._entries.values():
                entry.removed = True
        self.poll()
