"""``keras-emr serve``: a development server that answers as TensorFlow Serving does."""

from __future__ import annotations

import contextlib
import gc
import importlib
import os
import signal
import sys
import threading
from pathlib import Path

import click

from keras_emr.errors import UserError

_PORT = click.IntRange(0, 65535)
_OFF = "off"


class _Port(click.ParamType):
    """A port number, 0 for any free one, or ``off``."""

    name = "port"

    def convert(self, value, param, ctx):
        if value is None or str(value).lower() == _OFF:
            return None
        return _PORT.convert(value, param, ctx)


@click.command(name="serve", context_settings={"show_default": True})
@click.argument("store", metavar="[STORE]", required=False)
@click.option(
    "--rest-api-port", type=_Port(), default="8501", help="For REST; 0: any free one, or off."
)
@click.option("--port", type=_Port(), default="8500", help="For gRPC; 0: any free one, or off.")
@click.option("--host", default="127.0.0.1", help="Address to listen on.")
@click.option("--model-config-file", metavar="FILE", help="Text ModelServerConfig, not STORE.")
@click.option(
    "--model-config-file-poll-wait-seconds",
    type=click.FloatRange(0),
    default=0.0,
    help="Read that file again this often; 0: never.",
)
@click.option(
    "--file-system-poll-wait-seconds",
    type=click.FloatRange(0),
    default=1.0,
    help="Look for new versions this often; 0: never.",
)
@click.option(
    "--allow-version-labels-for-unavailable-models",
    is_flag=True,
    help="A new label may name a version that is not loaded, such as any at the start.",
)
@click.option(
    "--max-num-load-retries",
    type=click.IntRange(0),
    default=5,
    help="Attempts after the first to load a version.",
)
@click.option(
    "--load-retry-interval-micros",
    type=click.IntRange(0),
    default=60_000_000,
    help="Time between them; new files are tried at once.",
)
@click.option("--enable-batching", is_flag=True, help="Run requests that come together as one.")
@click.option("--batching-parameters-file", metavar="FILE", help="Text BatchingParameters.")
@click.option("--monitoring-config-file", metavar="FILE", help="Text MonitoringConfig.")
@click.option("--ssl-config-file", metavar="FILE", help="Text SSLConfig, for gRPC.")
@click.option(
    "--rest-api-timeout-in-ms",
    type=click.IntRange(1),
    default=30000,
    help="A request that takes longer is given up.",
)
@click.option(
    "--max-body-mib",
    type=click.IntRange(1, 2047),
    default=64,
    help="Largest REST request, unpacked.",
)
@click.option("--quiet", is_flag=True, help="No log on stderr but errors.")
def command(store, **flags):
    """Serve every STORE/NAME/VERSION over REST and gRPC, as TensorFlow Serving would.

    Any SavedModel will do; a new version is picked up while the server runs. This is for laptops
    and tests: in production, give the same folders to TensorFlow Serving. Ctrl-C ends it.
    """
    if bool(store) == bool(flags["model_config_file"]):
        raise click.UsageError("give either STORE or --model-config-file")
    _require_packages()
    stop = threading.Event()

    def handle(number, frame):
        stop.set()
        signal.signal(number, before[number])  # the next one ends it at once

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number in before:
        signal.signal(number, handle)
    try:
        with _logging_to_stderr(flags["quiet"]):
            return _serve(store, flags, stop)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _require_packages():
    from importlib.util import find_spec

    needed = ("tensorflow_serving", "grpc", "prometheus_client", "rapidjson", "starlette")
    missing = [name for name in (*needed, "uvicorn", "grpc_health") if find_spec(name) is None]
    if missing:
        raise UserError(
            f"serve: packages are missing. Received: no {', '.join(missing)}. Install them with "
            'pip install "keras-emr[serving]".'
        )


def _import_tensorflow():
    if "TF_CPP_MIN_LOG_LEVEL" in os.environ:  # the user's word on what it says
        return
    from keras_emr_cli.session import quiet_tensorflow

    with quiet_tensorflow():
        importlib.import_module("tensorflow")


def _serve(store, flags, stop):
    models = _models(store, flags["model_config_file"])
    options = _options(flags)
    _import_tensorflow()
    from keras_emr_serving.server.listen import CannotListen
    from keras_emr_serving.server.server import Server
    from keras_emr_serving.server.status import ServingError

    server = Server(models, options)
    try:
        server.start()
    except CannotListen as error:
        flag = "--rest-api-port" if error.api == "REST" else "--port"
        fix = "Choose another port, or 0 for any free one."
        if error.host:
            flag, fix = "--host", "Give an address of this machine."
        raise UserError(
            f"{flag}: cannot listen there: {error.reason}. Received: {error.address}. {fix}"
        ) from None
    except ServingError as error:
        raise UserError(
            f"--model-config-file: {error.message}. At the start nothing is: labels in the file "
            "need --allow-version-labels-for-unavailable-models, for TensorFlow Serving as well. "
            f"Received: {flags['model_config_file']!r}."
        ) from None
    try:
        _require_any(server)
        # What is loaded by now stays: collecting garbage must not walk through all of TensorFlow
        # (half a second, again and again under REST load).
        gc.collect()
        gc.freeze()
        _announce(server, flags["host"])
        while not stop.wait(0.5):
            pass
    finally:
        gc.unfreeze()
        server.stop()
    click.echo("stopped", err=True)


def _require_any(server):
    if not server.manager.serving():
        reasons = server.manager.unavailable().items()
        raise UserError(
            f"no model can be served. {'; '.join(f'{name}: {why}' for name, why in reasons)}"
        )


def _models(store, config_file):
    from keras_emr_serving.server.config import read_config, store_models
    from keras_emr_serving.server.status import ServingError

    if config_file:
        _import_tensorflow()  # its protos come with it
        text = read_text("--model-config-file", config_file)
        try:
            models = read_config(text)
        except ServingError as error:
            raise UserError(
                f"--model-config-file: {error.message}. Received: {config_file!r}."
            ) from None
        _require_models(models, config_file)
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
    return models


def _require_models(models, config_file):
    from keras_emr_serving.server.config import aspired

    if not models:
        raise UserError(f"--model-config-file: it names no model. Received: {config_file!r}.")
    for one in models:
        try:
            found = aspired(one)
        except OSError as error:
            raise UserError(
                f"--model-config-file: model {one.name!r}: cannot read its folder: "
                f"{error.strerror}. Received: {str(one.base_path)!r}."
            ) from None
        if not found:
            raise UserError(
                f"--model-config-file: model {one.name!r}: no such version to serve. Received: "
                f"{str(one.base_path)!r}. Expected VERSION/saved_model.pb in it."
            )


def read_text(flag, path):
    """The text of a configuration file. Raises :class:`UserError` naming ``flag``."""
    try:
        return Path(path).read_text()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not a text file"
        raise UserError(f"{flag}: cannot be read: {reason}. Received: {path!r}.") from None


def _options(flags):
    from keras_emr_serving.server.rest import METRICS_PATH
    from keras_emr_serving.server.server import Options
    from keras_emr_serving.server.text_protos import read_monitoring, read_ssl

    config = flags["model_config_file"]
    monitoring = _parsed(
        flags, "monitoring_config_file", lambda text: read_monitoring(text, METRICS_PATH)
    )
    return Options(
        host=flags["host"],
        rest_port=flags["rest_api_port"],
        grpc_port=flags["port"],
        rest_timeout_ms=flags["rest_api_timeout_in_ms"],
        max_body=flags["max_body_mib"] << 20,
        poll_seconds=flags["file_system_poll_wait_seconds"],
        config_file=Path(config) if config else None,
        config_poll_seconds=flags["model_config_file_poll_wait_seconds"],
        early_labels=flags["allow_version_labels_for_unavailable_models"],
        load_retries=flags["max_num_load_retries"],
        load_retry_seconds=flags["load_retry_interval_micros"] / 1e6,
        metrics_path=monitoring if flags["monitoring_config_file"] else METRICS_PATH,
        grpc_credentials=_parsed(flags, "ssl_config_file", read_ssl),
        batcher=_batcher(flags),
    )


def _batcher(flags):
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
    read = _parsed(flags, "batching_parameters_file", lambda text: read_batching(text, cpus))
    settings = read or Batching(threads=cpus)

    def wrap(servable):
        made = Batcher(servable, settings)
        return made.run, made.stop

    return wrap


def _parsed(flags, name, read):
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


@contextlib.contextmanager
def _logging_to_stderr(quiet):
    import logging

    logging.getLogger("tensorflow").setLevel(logging.ERROR)
    log = logging.getLogger("keras_emr_serving")
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    before = log.level, log.propagate
    log.addHandler(handler)
    log.propagate = False
    log.setLevel(logging.ERROR if quiet else logging.INFO)
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.propagate = before[1]
        log.setLevel(before[0])


def _announce(server, host):
    shown = f"[{host}]" if ":" in host else host
    for name, why in server.manager.unavailable().items():
        click.echo(f"not served: {name}: {' '.join(why.split())}", err=True)
    for name, number in server.manager.serving():
        click.echo(f"serving {name} version {number}")
    if server.rest_port is not None:
        click.echo(f"REST: http://{shown}:{server.rest_port}/v1/models")
    if server.grpc_port is not None:
        click.echo(f"gRPC: {shown}:{server.grpc_port}")
    if not server.xla_disabled:
        click.echo("XLA could not be switched off: TensorFlow Serving may refuse more", err=True)
    click.echo(
        "A development server. In production, serve the same folders with TensorFlow Serving. "
        "Ctrl-C ends it."
    )
    sys.stdout.flush()
