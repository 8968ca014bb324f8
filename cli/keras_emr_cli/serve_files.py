"""What ``keras-emr serve`` reads before it starts: models and configuration files."""

from __future__ import annotations

import importlib
import os
from pathlib import Path

from keras_emr.errors import UserError


def import_tensorflow():
    """Import TensorFlow, silently unless the user has said what it may print."""
    if "TF_CPP_MIN_LOG_LEVEL" in os.environ:
        return
    from keras_emr_cli.session import quiet_tensorflow

    with quiet_tensorflow():
        importlib.import_module("tensorflow")


def read_models(store, config_file):
    """What to serve: a list of ``ModelConfig``. Raises :class:`UserError`."""
    from keras_emr_serving.server.config import CONFIG, followed_store, read_config, store_models
    from keras_emr_serving.server.status import ServingError

    if config_file:
        import_tensorflow()  # its protos come with it
        text = read_text("--model-config-file", config_file)
        try:
            models = read_config(text)
        except ServingError as error:
            raise UserError(
                f"--model-config-file: {error.message}. Received: {config_file!r}."
            ) from None
        if not models:
            raise UserError(f"--model-config-file: it names no model. Received: {config_file!r}.")
        _require_models(models, "--model-config-file")
        return models
    folder = Path(store)
    if not folder.is_dir():
        raise UserError(f"STORE: no such folder. Received: {store!r}.")
    try:
        models = store_models(folder)
    except OSError as error:
        raise UserError(f"STORE: cannot be read: {error.strerror}. Received: {store!r}.") from None
    if not models:
        raise UserError(
            f"STORE: not a model store. Received: {store!r}. Expected NAME/VERSION/saved_model.pb "
            "in it, VERSION a number, as keras-emr export writes it."
        )
    file = folder / CONFIG
    if file.exists():
        import_tensorflow()  # its protos come with it
        read_text(CONFIG, file)
        try:
            models = followed_store(folder)
        except ServingError as error:
            raise UserError(f"{CONFIG}: {error.message}. Received: {str(file)!r}.") from None
        _require_models(models, CONFIG)
    return models


def _require_models(models, source):
    from keras_emr_serving.server.config import aspired

    for one in models:
        where = f"{source}: model {one.name!r}"
        try:
            found = aspired(one)
        except OSError as error:
            raise UserError(
                f"{where}: cannot read its folder: {error.strerror}. Received: "
                f"{str(one.base_path)!r}."
            ) from None
        if not found:
            raise UserError(
                f"{where}: no such version to serve. Received: {str(one.base_path)!r}. Expected "
                "VERSION/saved_model.pb in it."
            )


def read_text(flag, path):
    """The text of a configuration file. Raises :class:`UserError` naming ``flag``."""
    try:
        return Path(path).read_text()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not a text file"
        raise UserError(f"{flag}: cannot be read: {reason}. Received: {path!r}.") from None


def batcher(flags):
    """What wraps a servable in batches, or ``None``."""
    if not flags["enable_batching"]:
        if flags["batching_parameters_file"]:
            raise UserError(
                "--batching-parameters-file: it needs --enable-batching. Received: "
                f"{flags['batching_parameters_file']!r} without it."
            )
        return None
    from keras_emr_serving.server.batching import Batcher
    from keras_emr_serving.server.text_protos import Batching, read_batching

    cpus = os.cpu_count() or 1
    read = parsed(flags, "batching_parameters_file", lambda text: read_batching(text, cpus))
    settings = read or Batching(threads=cpus)

    def wrap(servable):
        made = Batcher(servable, settings)
        return made.run, made.stop

    return wrap


def parsed(flags, name, read):
    """What ``read`` makes of the text file of a flag; ``None`` if the flag is not given."""
    from keras_emr_serving.server.status import ServingError

    path, flag = flags[name], "--" + name.replace("_", "-")
    if path is None:
        return None
    text = read_text(flag, path)
    try:
        return read(text)
    except ServingError as error:
        raise UserError(f"{flag}: {error.message}. Received: {path!r}.") from None
