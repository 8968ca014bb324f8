"""Which models to serve: a model store, or a text ``ModelServerConfig`` as TF Serving takes it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

from keras_emr_serving.server.status import ServingError, invalid

CONFIG = "models.config"  # in a store


@dataclass(frozen=True)
class ModelConfig:
    """One model. ``versions``: ``"all"``, how many of the latest, or a tuple of wanted numbers."""

    name: str
    base_path: Path
    versions: str | int | tuple[int, ...] = 1
    labels: dict[str, int] = field(default_factory=dict)


def is_model(folder: Path) -> bool:
    """Whether ``folder`` has at least one numeric version with a SavedModel in it."""
    return any(complete(path) for path in version_folders(folder).values())


def complete(path: Path) -> bool:
    """Whether a version folder holds a SavedModel: without it, it is half-written."""
    return (path / "saved_model.pb").is_file() or (path / "saved_model.pbtxt").is_file()


def version_folders(base_path: Path) -> dict[int, Path]:
    """Version number -> folder, for every folder named by an integer. Raises ``OSError``."""
    found = {}
    for path in sorted(base_path.iterdir()):
        name = path.name
        if name.isascii() and name.isdigit() and int(name) < 2**63 and path.is_dir():
            found.setdefault(int(name), path)
    return found


def aspired(config: ModelConfig) -> dict[int, Path]:
    """The versions that should be served now; half-written ones are left out."""
    ready = {n: path for n, path in version_folders(config.base_path).items() if complete(path)}
    if config.versions == "all":
        return ready
    if isinstance(config.versions, int):
        wanted = sorted(ready)[-config.versions :]
    else:
        wanted = [n for n in config.versions if n in ready]
    return {n: ready[n] for n in wanted}


def store_models(store: Path) -> list[ModelConfig]:
    """Every model of the folder ``store``, or ``store`` itself if it is one model's folder.

    Folders without a version are left out. Empty: no store.
    """
    if is_model(store):
        return [ModelConfig(store.resolve().name, store.resolve())]
    folders = [path for path in sorted(store.iterdir()) if path.is_dir() and path.name[0] != "."]
    return [ModelConfig(path.name, path.resolve()) for path in folders if is_model(path)]


def followed_store(store: Path) -> list[ModelConfig]:
    """:func:`store_models`, but as ``STORE/models.config`` says for those that it names.

    What it calls by a path that is not of this machine, such as a container's, is taken from here.

    Raises:
        ServingError: ``INVALID_ARGUMENT``: it is no ``ModelServerConfig``.
        OSError, UnicodeDecodeError: the store or the file cannot be read.
    """
    models = {one.name: one for one in store_models(store)}
    file = store / CONFIG
    for one in read_config(file.read_text()) if file.is_file() else ():
        here = store.resolve() / one.base_path.name
        elsewhere = not one.base_path.is_dir() and here.is_dir()
        models[one.name] = replace(one, base_path=here) if elsewhere else one
    return list(models.values())


def read_config(text: str) -> list[ModelConfig]:
    """The models of a text ``ModelServerConfig``. Raises ``INVALID_ARGUMENT``."""
    from google.protobuf import text_format
    from tensorflow_serving.config.model_server_config_pb2 import ModelServerConfig

    try:
        config = text_format.Parse(text, ModelServerConfig())
    except text_format.ParseError as error:
        raise invalid(f"not a ModelServerConfig: {error}") from None
    if not config.WhichOneof("config"):
        raise invalid("not a ModelServerConfig: it has no model_config_list")
    return from_proto(config)


def from_proto(config) -> list[ModelConfig]:
    """The models of a ``ModelServerConfig``. Raises ``INVALID_ARGUMENT``."""
    if config.WhichOneof("config") != "model_config_list":
        raise invalid(
            "ServerModelConfig type not supported by HandleReloadConfigRequest. Only "
            "ModelConfigList is currently supported"
        )
    models: dict[str, ModelConfig] = {}
    for one in config.model_config_list.config:
        if one.name in models:
            raise invalid(f"Illegal to list model {one.name} multiple times in config list")
        models[one.name] = _model(one)
    return list(models.values())


def _model(one):
    if not one.name:
        raise invalid("Expected model to have a name; got name()=")
    if not Path(one.base_path).is_absolute():
        raise invalid(
            f"Expected model {one.name} to have an absolute path or URI; got "
            f"base_path()={one.base_path}"
        )
    if one.model_platform != "tensorflow":
        raise invalid(
            f"Illegal setting for model {one.name}: model_platform is {one.model_platform!r}, only "
            "'tensorflow' is served"
        )
    return ModelConfig(
        one.name, Path(one.base_path), _policy(one), dict(one.version_labels.items())
    )


def _policy(one):
    policy = one.model_version_policy
    kind = policy.WhichOneof("policy_choice")
    if kind == "all":
        return "all"
    if kind == "specific":
        if not policy.specific.versions:
            raise ServingError(
                "INVALID_ARGUMENT", f"model {one.name}: policy specific lists no versions"
            )
        return tuple(policy.specific.versions)
    return (policy.latest.num_versions or 1) if kind == "latest" else 1
