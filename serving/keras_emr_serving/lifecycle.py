"""Which version of a model is the one that clients get: status, promote and roll back.

Clients ask for a label (``/v1/models/NAME/labels/stable``), and ``models.config`` says which
version carries it. The version before it keeps the label ``previous`` and stays loaded, so that
going back is only a matter of moving a label.

TensorFlow Serving looks at the labels of a new configuration *before* it loads anything, and
refuses the whole configuration when a label moves to a version that is not loaded yet. A promotion
therefore takes two writes: the first has the version loaded beside the others, the second, once
that is available, moves the label and lets go of versions that no label names.
"""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from keras_emr.errors import UserError, unknown
from keras_emr_serving.models_config import NAME, ConfigFile
from keras_emr_serving.running import ServerTrouble
from keras_emr_serving.server.config import ModelConfig, complete, version_folders

STABLE, PREVIOUS = "stable", "previous"
_LABEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


@dataclass(frozen=True)
class Status:
    """One model: what is on disk, what ``models.config`` says, what is wrong with that.

    ``versions``: number -> whether it is whole. ``labels``: label -> number. ``policy``: ``"latest
    1"``, ``"all"``, ``"specific 3, 4"``, or ``None`` for a model that is not in the file.
    """

    name: str
    versions: dict[int, bool]
    labels: dict[str, int]
    policy: str | None
    base_path: str | None
    wanted: list[int]
    problems: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Change:
    """What a promotion or a rollback did. ``was``: the version that had the label before."""

    name: str
    label: str
    version: int
    was: int | None
    previous: int | None
    path: str
    confirmed: bool


class Store:
    """A model store: ``STORE/NAME/VERSION/saved_model.pb`` and ``STORE/models.config``.

    Args:
        store: the folder.

    Raises:
        UserError: there is no such folder.
    """

    def __init__(self, store: Path | str):
        self.path = Path(store)
        if not self.path.is_dir():
            raise UserError(f"STORE: no such folder. Received: {str(store)!r}.")
        self.config = ConfigFile(self.path)

    # Looking --------------------------------------------------------------------------------

    def status(self, name: str | None = None) -> list[Status]:
        """Of every model on disk or in ``models.config``, or of ``name`` alone.

        Raises:
            UserError: a file that cannot be read, or no such model.
        """
        models = self.config.models(self.config.read())
        names = sorted({*self._names(), *models})
        if name is not None:
            if name not in names:
                raise self._no_model(name, names)
            names = [name]
        elif not names:
            raise UserError(
                f"STORE: not a model store. Received: {str(self.path)!r}. Expected "
                "NAME/VERSION/saved_model.pb in it, as keras-emr export writes it."
            )
        return [self._status(one, models.get(one)) for one in names]

    def _names(self):
        try:
            folders = [path for path in self.path.iterdir() if path.name[0] != "."]
            return [path.name for path in folders if path.is_dir() and version_folders(path)]
        except OSError as error:
            raise UserError(
                f"STORE: cannot be read: {error.strerror}. Received: {str(self.path)!r}."
            ) from None

    def _no_model(self, name, known):
        if known:
            return unknown("model", name, known)
        return UserError(
            f"STORE: no such model in it. Received: {name!r}. Expected {self.path / name}/VERSION/"
            "saved_model.pb, as keras-emr export writes it."
        )

    def _status(self, name, model):
        try:
            versions = self._versions(name, model)
        except UserError:
            versions = {}
        problems = []
        if model is None:
            return Status(name, versions, {}, None, None, [], problems)
        if not versions:
            problems.append(f"{NAME} names model {name!r}, which is not in the store")
        wanted = _wanted(model, versions)
        for label, number in sorted(model.labels.items()):
            if versions and not versions.get(number):
                state = "half-written" if number in versions else "missing"
                problems.append(f"label {label!r} of {name!r} is on version {number}: {state}")
            elif versions and number not in wanted:
                problems.append(f"label {label!r} of {name!r} is on a version that is not served")
        return Status(
            name,
            versions,
            dict(sorted(model.labels.items())),
            _policy_text(model),
            str(model.base_path),
            wanted,
            problems,
        )

    def _folder(self, name, model):
        """Where the model is here: the path in the file may be a container's."""
        return self.path / (model.base_path.name if model and model.base_path.name else name)

    def _versions(self, name, model):
        """Number -> whether it is whole, of every version on disk."""
        folder = self._folder(name, model)
        try:
            found = version_folders(folder)
        except OSError as error:
            raise UserError(
                f"{name}: cannot look into the model's folder: {error.strerror}. Received: "
                f"{str(folder)!r}. Expected VERSION/saved_model.pb in it."
            ) from None
        return {number: complete(path) for number, path in sorted(found.items())}

    def _require(self, name, model, versions, number):
        if number not in versions:
            known = ", ".join(map(str, versions)) or "none"
            raise UserError(
                f"{name}: no such version. Received: {number}. Expected one of: {known}"
            )
        if not versions[number]:
            raise UserError(
                f"{name}: version {number} is half-written. Received: "
                f"{str(self._folder(name, model) / str(number))!r} without saved_model.pb. Export "
                "it again."
            )

    # Changing -------------------------------------------------------------------------------

    def promote(
        self,
        name: str,
        version: int | None = None,
        label: str = STABLE,
        base_path: str | None = None,
        server=None,
        pause: float = 10.0,
        timeout: float = 300.0,
        tell: Callable[[str], None] = lambda text: None,
    ) -> Change:
        """Move ``label`` to ``version``; the version that had it is remembered.

        Args:
            name: the model's folder in the store.
            version: default: the newest whole one.
            label: what clients ask for.
            base_path: the folder that holds the models where the server sees it, such as
                ``/models``; default: that of the models already listed, or else the store itself.
            server: a :class:`~keras_emr_serving.running.RestServer` or ``GrpcServer`` to follow
                the change on, or ``None``.
            pause: seconds between the two writes when there is no ``server`` to ask.
            timeout: seconds that a ``server`` has for each step.
            tell: is given lines about what is being waited for.

        Raises:
            UserError: bad input; nothing has changed.
            ServerTrouble: the server does not follow. If it could not load the version, the file is
                as it was before.
        """
        require_label(label)
        with self.config.locked():
            text = self.config.read()
            models = self.config.models(text)
            model = models.get(name)
            known = sorted({*self._names(), *models})
            if name not in known:
                raise self._no_model(name, known)
            versions = self._versions(name, model)
            if version is None:
                whole = [number for number, is_whole in versions.items() if is_whole]
                if not whole:
                    raise UserError(
                        f"{name}: no version to promote. Received: "
                        f"{str(self._folder(name, model))!r}. Expected VERSION/saved_model.pb."
                    )
                version = max(whole)
            self._require(name, model, versions, version)
            labels = dict(model.labels) if model else {}
            was = labels.get(label)
            labels[label] = version
            if was not in (None, version):
                if versions.get(was):
                    labels[previous_of(label)] = was
                else:  # it cannot be gone back to
                    labels.pop(previous_of(label), None)
                    tell(f"version {was}, which had label {label!r}, is not on disk any more")
            # A label on a version that is gone would make the server refuse everything.
            for other, number in list(labels.items()):
                if not versions.get(number):
                    del labels[other]
                    tell(f"label {other!r} is dropped: version {number} is not on disk any more")
            path = f"{self._base(base_path, models)}/{name}"
            return self._move(
                text, name, model, versions, label, labels, path, server, pause, timeout, tell
            )

    def rollback(
        self,
        name: str,
        label: str = STABLE,
        server=None,
        pause: float = 10.0,
        timeout: float = 300.0,
        tell: Callable[[str], None] = lambda text: None,
    ) -> Change:
        """Move ``label`` back to the version that had it before; the two change places.

        Arguments and errors are those of :meth:`promote`.
        """
        require_label(label)
        with self.config.locked():
            text = self.config.read()
            models = self.config.models(text)
            if name not in models:
                raise (
                    self._no_model(name, sorted({*self._names(), *models}))
                    if (name not in self._names())
                    else self._nothing(name, label)
                )
            model = models[name]
            labels = dict(model.labels)
            target = labels.get(previous_of(label))
            if target is None:
                raise self._nothing(name, label)
            versions = self._versions(name, model)
            self._require(name, model, versions, target)
            was = labels.get(label)
            labels[label] = target
            if was is None or not versions.get(was):
                labels.pop(previous_of(label))
            else:
                labels[previous_of(label)] = was
            path = str(model.base_path)
            return self._move(
                text, name, model, versions, label, labels, path, server, pause, timeout, tell
            )

    def _nothing(self, name, label):
        return UserError(
            f"{name}: nothing to roll back to: no version has the label {previous_of(label)!r}. "
            f"Received: {name!r}, label {label!r}. `keras-emr serving promote` remembers the "
            "version before."
        )

    def _base(self, given, models):
        """The folder of all models, as the server sees it."""
        if given is not None:
            if not given.startswith("/"):
                raise UserError(
                    f"--base-path: not absolute. Received: {given!r}. Expected a path such as "
                    "/models."
                )
            return given.rstrip("/")
        parents = {str(model.base_path.parent) for model in models.values()}
        return parents.pop() if len(parents) == 1 else str(self.path.resolve())

    def _move(self, text, name, model, versions, label, labels, path, server, pause, timeout, tell):
        """Write, in two steps where the server needs them."""
        version = labels[label]
        was = model.labels.get(label) if model else None
        final = self.config.changed(text, name, sorted(set(labels.values())), labels, path)
        if server is not None:
            loaded = _available(server, name, version)
        else:
            loaded = was in (None, version) or version in _wanted(model, versions)
        if not loaded:
            before = _wanted(model, versions) if model else []
            both = sorted({version, *before, *labels.values()} & {*_whole(versions)})
            # Not yet one new label: the server would refuse all of it.
            old = {k: n for k, n in (model.labels.items() if model else ()) if n in both}
            self.config.write(self.config.changed(text, name, both, old, path))
            if server is None:
                tell(
                    f"{NAME}: version {version} is to be loaded; its label follows in {pause:g} s, "
                    "so that a server that reads the file again and again has seen this "
                    "(--pause 0 if none is running; --url or --grpc to be sure)"
                )
                time.sleep(pause)
            else:
                try:
                    tell(f"waiting until {server.where} has loaded version {version}")
                    server.reload(self.config.read())
                    _wait_for_version(server, name, version, timeout)
                except BaseException:
                    self.config.restore(text)
                    with contextlib.suppress(ServerTrouble):
                        server.reload(text)
                    raise
        self.config.write(final)
        if server is not None:
            server.reload(final)
            _wait_for_label(server, name, label, version, timeout)
        return Change(
            name,
            label,
            version,
            was,
            labels.get(previous_of(label)),
            str(self.config.path),
            server is not None,
        )


def require_label(label: str) -> None:
    """Refuse what cannot be a label to promote to. Raises :class:`UserError`."""
    if not _LABEL.fullmatch(label):
        raise UserError(
            f"--label: not a label. Received: {label!r}. Expected letters, digits, '.', '_', '-'."
        )
    if label == PREVIOUS or label.endswith(f"-{PREVIOUS}"):
        raise UserError(
            f"--label: it is kept for the version before. Received: {label!r}. Choose another."
        )


def previous_of(label: str) -> str:
    """The label of the version that had ``label`` before."""
    return PREVIOUS if label == STABLE else f"{label}-{PREVIOUS}"


def _whole(versions):
    return [number for number, is_whole in versions.items() if is_whole]


def _wanted(model: ModelConfig, versions: dict[int, bool]) -> list[int]:
    """The versions that the model's policy asks for, of those that are whole."""
    whole = _whole(versions)
    if model.versions == "all":
        return whole
    if isinstance(model.versions, int):
        return whole[-model.versions :]
    return [number for number in whole if number in model.versions]


def _policy_text(model):
    if model.versions == "all":
        return "all"
    if isinstance(model.versions, int):
        return f"latest {model.versions}"
    return "specific " + ", ".join(map(str, model.versions))


def _available(server, name, version):
    found = server.states(name).get(version)
    return found is not None and found.state == "AVAILABLE"


def _wait_for_version(server, name, version, timeout):
    deadline = time.monotonic() + timeout
    while True:
        found = server.states(name).get(version)
        if found is not None and found.state == "AVAILABLE":
            return
        if found is not None and found.state == "END" and found.error:
            raise ServerTrouble(
                f"{server.where} cannot load version {version} of {name}: {found.error}. Nothing "
                "has changed."
            )
        if time.monotonic() >= deadline:
            raise ServerTrouble(
                f"{server.where} has not loaded version {version} of {name} in {timeout:g} s. "
                f"Nothing has changed. Does it read {NAME} again "
                "(--model_config_file_poll_wait_seconds), or give --grpc?"
            )
        time.sleep(0.2)


def _wait_for_label(server, name, label, version, timeout):
    deadline = time.monotonic() + timeout
    while True:
        if server.labelled(name, label) == version:
            return
        if time.monotonic() >= deadline:
            raise ServerTrouble(
                f"{server.where} has not moved label {label!r} to version {version} of {name} in "
                f"{timeout:g} s. {NAME} says so: it follows when the server reads that."
            )
        time.sleep(0.2)
