"""Which versions of which models are loaded, and the switch from one to the next."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from keras_emr_serving.server.config import ModelConfig, aspired
from keras_emr_serving.server.labels import assign
from keras_emr_serving.server.metrics import Metrics
from keras_emr_serving.server.status import ServingError, invalid
from keras_emr_serving.server.version import Version, fingerprint, load

log = logging.getLogger("keras_emr_serving")
LIVE = ("START", "LOADING", "AVAILABLE", "UNLOADING")
_UNLOAD_SECONDS = 5  # that a poll waits for versions to be gone; busy ones go later
_CLOSE_SECONDS = 60


@dataclass
class _Entry:
    config: ModelConfig
    versions: dict[int, Version] = field(default_factory=dict)
    wanted: dict[int, Path] = field(default_factory=dict)
    removed: bool = False
    trouble: str = ""


class Manager:
    """Loads what the configured policies ask for and unloads the rest.

    Args:
        models: what to serve.
        metrics: where loads and run times are counted.
        batcher: wraps a servable's ``run`` and returns ``(run, stop)``; ``None``: no batching.
        early_labels: whether a new label may name a version that is not available.
        retries: how often a version that cannot be loaded is tried again while its files stay as
            they are; a change of its files gives it another chance at any time.
        retry_seconds: the time between two such attempts.
    """

    def __init__(
        self,
        models: Iterable[ModelConfig],
        metrics: Metrics,
        batcher: Callable | None = None,
        early_labels: bool = False,
        retries: int = 5,
        retry_seconds: float = 60.0,
    ):
        self._entries = {one.name: _Entry(one) for one in models}
        self._metrics, self._batcher = metrics, batcher
        self._early_labels = early_labels
        self._retries, self._retry_seconds = retries, retry_seconds
        self._labels: dict[str, dict[str, int]] = {}
        self._lock = threading.Condition()
        self._changing = threading.RLock()  # one at a time loads, unloads or reconfigures
        self._unloading: list[threading.Thread] = []
        self._closed = False

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
                if not found.users:
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
        self, name: str, version: int | None = None
    ) -> list[tuple[int, str, ServingError | None]]:
        """(version, state, error) of every version ever seen, the latest first."""
        with self._lock:
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

    def knows(self, name: str) -> bool:
        """Whether there is or was such a model."""
        return name in self._entries

    @property
    def configs(self) -> list[ModelConfig]:
        """The configuration in force."""
        with self._lock:
            return [one.config for one in self._entries.values() if not one.removed]

    def unavailable(self) -> dict[str, str]:
        """Configured models with no version to serve: name -> why."""
        with self._lock:
            missing = {}
            for name, entry in self._entries.items():
                versions = entry.versions.items()
                if entry.removed or any(one.state == "AVAILABLE" for _, one in versions):
                    continue
                errors = [f"version {n}: {one.error}" for n, one in sorted(versions) if one.error]
                missing[name] = "; ".join(errors) or entry.trouble or "no version to load"
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

    def start(self) -> None:
        """Load everything for the first time. Raises as :meth:`reconfigure` does for labels."""
        self._take_over([entry.config for entry in self._entries.values()])

    def reconfigure(self, models: Iterable[ModelConfig]) -> None:
        """Serve ``models`` from now on.

        Labels are checked first, against what is loaded before: one that is refused leaves all as
        it is. Then versions are loaded, and those that are no longer wanted unloaded.

        Raises:
            ServingError: a label for a version that is not available (``FAILED_PRECONDITION``), or
                a new model that does not become available (``UNKNOWN``; the rest is taken over).
        """
        known = {one.name for one in self.configs}
        models = list(models)
        self._take_over(models)
        new = {one.name for one in models} - known
        missing = {name: why for name, why in self.unavailable().items() if name in new}
        if missing:
            text = "".join(f"{{{{name: {n}}} due to error: {why}}}, " for n, why in missing.items())
            raise ServingError(
                "UNKNOWN", f"{len(missing)} servable(s) did not become available: {{{text}}}"
            )

    def follow(self, read: Callable[[], list[ModelConfig]]) -> bool:
        """Serve what ``read`` says; whether that is another thing than before.

        Nothing else is taken over in between: what was read before that would be stale.
        """
        with self._changing:
            models = read()
            if {one.name: one for one in models} == {one.name: one for one in self.configs}:
                return False
            self.reconfigure(models)
            return True

    def _take_over(self, models):
        with self._changing:
            with self._lock:
                states = {
                    name: {n: one.state for n, one in entry.versions.items()}
                    for name, entry in self._entries.items()
                }
                self._labels = assign(models, states, self._labels, self._early_labels)
                for entry in self._entries.values():
                    entry.removed = True
                for one in models:
                    entry = self._entries.setdefault(one.name, _Entry(one))
                    entry.config, entry.removed = one, False
            self._look(self._refresh)

    def poll(self) -> None:
        """Look at the folders once: load what is new, then unload what is no longer wanted."""
        with self._changing:
            self._look(self._refresh)

    def retry(self) -> None:
        """Try again what could not be loaded and is due, without looking for new versions."""
        with self._changing:
            self._look(lambda entry: None)

    def _look(self, refresh):
        with self._lock:
            entries = list(self._entries.values())
        leaving = []
        for entry in entries:
            try:
                refresh(entry)
                for number, path in sorted(entry.wanted.items()):
                    if not self._closed:
                        self._load_if_due(entry, number, path)
                leaving += self._retire(entry)
            except Exception:  # the others must not suffer from it
                log.exception("model %s: looking for versions failed", entry.config.name)
        _join(leaving, _UNLOAD_SECONDS)
        self._unloading = [one for one in (*self._unloading, *leaving) if one.is_alive()]

    def _refresh(self, entry):
        """Read from disk what the entry's policy wants."""
        if entry.removed:
            entry.wanted, entry.trouble = {}, ""
            return
        config, trouble = entry.config, ""
        try:
            entry.wanted = aspired(config)
        except OSError as error:  # what is loaded stays
            trouble = f"Could not find base path {config.base_path}: {error.strerror}"
        else:
            listed = config.versions if isinstance(config.versions, tuple) else ()
            missing = ", ".join(str(n) for n in listed if n not in entry.wanted)
            if missing:
                trouble = f"no such version in {config.base_path}: {missing}"
        if trouble and trouble != entry.trouble:
            log.error("model %s: %s", config.name, trouble)
        entry.trouble = trouble

    def _load_if_due(self, entry, number, path):
        known = entry.versions.get(number)
        if known is not None and known.state in LIVE:
            return
        version = Version(number, path, "LOADING", fingerprint=fingerprint(path))
        if known is not None and known.error is not None:
            if known.fingerprint == version.fingerprint:
                if known.failures > self._retries or time.monotonic() < known.retry_at:
                    return
                version.failures = known.failures
        self._load(entry, version)

    def _load(self, entry, version):
        name, number = entry.config.name, version.number
        with self._lock:
            entry.versions[number] = version
        log.info("model %s version %d: loading %s", name, number, version.path)
        try:
            loaded = load(name, version.path, self._metrics, self._batcher)
        except ServingError as error:
            version.failures += 1
            version.retry_at = time.monotonic() + self._retry_seconds
            with self._lock:
                version.state, version.error = "END", error
            left = self._retries + 1 - version.failures
            then = f"tried again in {self._retry_seconds:g} s" if left else "given up"
            log.error("model %s version %d: cannot be loaded, %s: %s", name, number, then, error)
            return
        with self._lock:
            version.servable, version.model, version.stop = loaded
            version.state = "AVAILABLE"
        log.info("model %s version %d: available", name, number)

    def _retire(self, entry):
        """Begin to unload what is no longer wanted; the threads that see to it."""
        with self._lock:
            ready = {n for n, one in entry.versions.items() if one.state == "AVAILABLE"}
            # The last version that works is kept until one that should replace it does.
            if entry.wanted and not ready & set(entry.wanted):
                return []
            gone = [entry.versions[n] for n in sorted(ready - set(entry.wanted))]
            for version in gone:
                version.state = "UNLOADING"
        threads = [
            threading.Thread(target=self._unload, args=(entry.config.name, one), daemon=True)
            for one in gone
        ]
        for thread in threads:
            thread.start()
        return threads

    def _unload(self, name, version):
        with self._lock:
            self._lock.wait_for(lambda: not version.users)
        try:
            version.release()
        except Exception:
            log.exception("model %s version %d: unloading failed", name, version.number)
        with self._lock:
            version.state = "END"
        log.info("model %s version %d: unloaded", name, version.number)

    def close(self) -> None:
        """Unload everything; versions in use are waited for, but not for ever."""
        self._closed = True
        with self._lock:
            for entry in self._entries.values():
                entry.removed = True
        self.poll()
        _join(self._unloading, _CLOSE_SECONDS)


def _join(threads, seconds):
    end = time.monotonic() + seconds
    for thread in threads:
        thread.join(max(0.0, end - time.monotonic()))
