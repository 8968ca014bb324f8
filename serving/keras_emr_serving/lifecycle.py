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
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from keras_emr.errors import UserError
from keras_emr_serving.following import is_available, wait_blindly, wait_for_label, wait_for_version
from keras_emr_serving.labels import STABLE, previous_of, require_label
from keras_emr_serving.models_config import ConfigFile
from keras_emr_serving.running import ServerTrouble
from keras_emr_serving.server.config import ModelConfig
from keras_emr_serving.stored import (
    Status,
    look,
    model_folder,
    no_model,
    require_version,
    stored_names,
    versions_of,
    wanted_of,
    whole,
)


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
            raise UserError(
                f"STORE: no such folder. Received: {str(store)!r}. Expected the one that keras-emr "
                "export --to wrote to."
            )
        self.config = ConfigFile(self.path)

    def status(self, name: str | None = None) -> list[Status]:
        """Of every model on disk or in ``models.config``, or of ``name`` alone.

        Raises:
            UserError: a file that cannot be read, or no such model.
        """
        models = self.config.models(self.config.read())
        names = self._known(models)
        if name is not None:
            self._require_model(name, models)
            names = [name]
        elif not names:
            raise UserError(
                f"STORE: not a model store. Received: {str(self.path)!r}. Expected "
                "NAME/VERSION/saved_model.pb in it, as keras-emr export writes it."
            )
        return [look(self.path, one, models.get(one)) for one in names]

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
            self._require_model(name, models)
            model = models.get(name)
            versions = versions_of(self.path, name, model)
            if version is None:
                if not whole(versions):
                    raise UserError(
                        f"{name}: no version to promote. Received: "
                        f"{str(model_folder(self.path, name, model))!r}. Expected "
                        "VERSION/saved_model.pb in it."
                    )
                version = max(whole(versions))
            require_version(self.path, name, model, versions, version)
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
            move = _Move(text, name, model, versions, label, labels, path)
            return self._carry_out(move, server, pause, timeout, tell)

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
            self._require_model(name, models)
            model = models.get(name)
            labels = dict(model.labels) if model else {}
            target = labels.get(previous_of(label))
            if target is None:
                raise UserError(
                    f"{name}: nothing to roll back to: no version has the label "
                    f"{previous_of(label)!r}. Received: label {label!r}. Expected one that "
                    "`keras-emr serving promote` has moved before."
                )
            versions = versions_of(self.path, name, model)
            require_version(self.path, name, model, versions, target)
            was = labels.get(label)
            labels[label] = target
            if was is None or not versions.get(was):
                labels.pop(previous_of(label))
            else:
                labels[previous_of(label)] = was
            move = _Move(text, name, model, versions, label, labels, str(model.base_path))
            return self._carry_out(move, server, pause, timeout, tell)

    def _known(self, models):
        return sorted({*stored_names(self.path), *models})

    def _require_model(self, name, models):
        known = self._known(models)
        if name not in known:
            raise no_model(self.path, name, known)

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

    def _carry_out(self, move, server, pause, timeout, tell):
        """Write, in two steps where the server needs them."""
        config, name, version = self.config, move.name, move.labels[move.label]
        numbers = sorted(set(move.labels.values()))
        final = config.changed(move.text, name, numbers, move.labels, move.path)
        before = None if server is None else server.states(name).get(version)
        loaded = move.is_loaded if server is None else is_available(before)
        written = move.text
        try:
            if not loaded:
                both, old = move.beside()
                step = config.changed(move.text, name, both, old, move.path)
                # A promotion that was cut short has taken this step: its time counts.
                age = config.age() if server is None and version in move.wanted else 0.0
                if age == 0.0:
                    config.write(step, over=written)
                    written = step
                if server is None:
                    wait_blindly(version, max(0.0, pause - age), tell)
                else:
                    tell(f"waiting until {server.where} has loaded version {version}")
                    server.reload(written)
                    wait_for_version(server, name, version, timeout, before)
            config.write(final, over=written)
            written = final
            if server is not None:
                server.reload(final)
        except BaseException:
            if written != move.text and config.read() == written:
                config.restore(move.text)
                if server is not None:
                    with contextlib.suppress(ServerTrouble):
                        server.reload(move.text)
            raise
        if server is not None:
            wait_for_label(server, name, move.label, version, timeout)
        previous = move.labels.get(previous_of(move.label))
        told = previous, str(config.path), server is not None
        return Change(name, move.label, version, move.was, *told)


@dataclass(frozen=True)
class _Move:
    """A change of ``models.config``: ``text`` as it is, ``labels`` as they are to be."""

    text: str
    name: str
    model: ModelConfig | None
    versions: dict[int, bool]
    label: str
    labels: dict[str, int]
    path: str

    @property
    def was(self):
        """The version that has the label now, or ``None``."""
        return self.model.labels.get(self.label) if self.model else None

    @property
    def wanted(self):
        """What the file has loaded now."""
        return wanted_of(self.model, self.versions) if self.model else []

    @property
    def is_loaded(self):
        """Whether a server that follows the file can move the label at once.

        A version with a label has been loaded for it; a new label needs no loaded version, where
        the server allows that at all, as ours does for its start.
        """
        version = self.labels[self.label]
        return self.was is None or version in self.model.labels.values()

    def beside(self):
        """The new version beside the others, but not one new label: all would be refused."""
        numbers = {self.labels[self.label], *self.wanted, *self.labels.values()}
        both = sorted(numbers & {*whole(self.versions)})
        return both, {
            k: n for k, n in (self.model.labels if self.model else {}).items() if n in both
        }
