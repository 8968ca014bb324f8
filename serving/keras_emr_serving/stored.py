"""What is in a model store, and what ``models.config`` makes of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from keras_emr.errors import UserError, unknown
from keras_emr_serving.models_config import NAME
from keras_emr_serving.server.config import ModelConfig, complete, version_folders


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


def stored_names(store: Path) -> list[str]:
    """The models on disk. Raises :class:`UserError`."""
    try:
        folders = [path for path in store.iterdir() if path.name[0] != "."]
        return [path.name for path in folders if path.is_dir() and version_folders(path)]
    except OSError as error:
        raise UserError(
            f"STORE: cannot be read: {error.strerror}. Received: {str(store)!r}. Expected a "
            "folder of NAME/VERSION/saved_model.pb."
        ) from None


def no_model(store: Path, name: str, known: list[str]) -> UserError:
    """The error of a model that is neither on disk nor in ``models.config``."""
    if known:
        return unknown("model", name, known)
    return UserError(
        f"STORE: no such model in it. Received: {name!r}. Expected {store / name}/VERSION/"
        "saved_model.pb, as keras-emr export writes it."
    )


def look(store: Path, name: str, model: ModelConfig | None) -> Status:
    """The :class:`Status` of one model; ``model``: its entry in ``models.config``, if any."""
    try:
        versions = versions_of(store, name, model)
    except UserError:
        versions = {}
    if model is None:
        return Status(name, versions, {}, None, None, [])
    problems = []
    if not versions:
        problems.append(f"{NAME} names model {name!r}, which is not in the store")
    wanted = wanted_of(model, versions)
    for label, number in sorted(model.labels.items()):
        if versions and not versions.get(number):
            state = "half-written" if number in versions else "missing"
            problems.append(f"label {label!r} of {name!r} is on version {number}: {state}")
        elif versions and number not in wanted:
            problems.append(f"label {label!r} of {name!r} is on a version that is not served")
    labels = dict(sorted(model.labels.items()))
    policy, path = _policy_text(model), str(model.base_path)
    return Status(name, versions, labels, policy, path, wanted, problems)


def versions_of(store: Path, name: str, model: ModelConfig | None) -> dict[int, bool]:
    """Number -> whether it is whole, of every version on disk. Raises :class:`UserError`."""
    folder = model_folder(store, name, model)
    try:
        found = version_folders(folder)
    except OSError as error:
        raise UserError(
            f"{name}: cannot look into the model's folder: {error.strerror}. Received: "
            f"{str(folder)!r}. Expected VERSION/saved_model.pb in it."
        ) from None
    return {number: complete(path) for number, path in sorted(found.items())}


def model_folder(store: Path, name: str, model: ModelConfig | None) -> Path:
    """Where the model is here: the path in the file may be a container's."""
    return store / (model.base_path.name if model and model.base_path.name else name)


def require_version(store, name, model, versions, number) -> None:
    """Raise :class:`UserError` unless version ``number`` is there and whole."""
    if number not in versions:
        known = ", ".join(map(str, versions)) or "none"
        raise UserError(f"{name}: no such version. Received: {number}. Expected one of: {known}.")
    if not versions[number]:
        folder = model_folder(store, name, model) / str(number)
        raise UserError(
            f"{name}: version {number} is half-written. Received: {str(folder)!r}. Expected "
            "saved_model.pb in it: export it again."
        )


def whole(versions: dict[int, bool]) -> list[int]:
    """The versions that are not half-written, ascending."""
    return [number for number, is_whole in versions.items() if is_whole]


def wanted_of(model: ModelConfig, versions: dict[int, bool]) -> list[int]:
    """The versions that the model's policy asks for, of those that are whole."""
    found = whole(versions)
    if model.versions == "all":
        return found
    if isinstance(model.versions, int):
        return found[-model.versions :]
    return [number for number in found if number in model.versions]


def _policy_text(model):
    if model.versions == "all":
        return "all"
    if isinstance(model.versions, int):
        return f"latest {model.versions}"
    return "specific " + ", ".join(map(str, model.versions))
