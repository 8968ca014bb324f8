"""``keras-emr serve``: a development server that answers as TensorFlow Serving does."""

from __future__ import annotations

import contextlib
import gc
import signal
import sys
import threading
from pathlib import Path

import click

from keras_emr.errors import UserError
from keras_emr_cli.serve_files import batcher, import_tensorflow, parsed, read_models

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

    Any SavedModel will do; a new version is picked up while the server runs. STORE/models.config,
    which `keras-emr serving promote` writes, is followed. This is for laptops and tests: in
    production, give the same folders to TensorFlow Serving. Ctrl-C ends it.
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


def _serve(store, flags, stop):
    models = read_models(store, flags["model_config_file"])
    options = _options(store, flags)
    import_tensorflow()
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


def _options(store, flags):
    from keras_emr_serving.server.rest import METRICS_PATH
    from keras_emr_serving.server.server import Options
    from keras_emr_serving.server.text_protos import read_monitoring, read_ssl

    config, poll = flags["model_config_file"], flags["file_system_poll_wait_seconds"]
    reread = poll if store else flags["model_config_file_poll_wait_seconds"]
    monitoring = parsed(
        flags, "monitoring_config_file", lambda text: read_monitoring(text, METRICS_PATH)
    )
    return Options(
        host=flags["host"],
        rest_port=flags["rest_api_port"],
        grpc_port=flags["port"],
        rest_timeout_ms=flags["rest_api_timeout_in_ms"],
        max_body=flags["max_body_mib"] << 20,
        poll_seconds=poll,
        store=Path(store) if store else None,
        config_file=Path(config) if config else None,
        config_poll_seconds=reread,
        # A store has no other way to start than with its labels.
        early_labels=bool(store) or flags["allow_version_labels_for_unavailable_models"],
        load_retries=flags["max_num_load_retries"],
        load_retry_seconds=flags["load_retry_interval_micros"] / 1e6,
        metrics_path=monitoring if flags["monitoring_config_file"] else METRICS_PATH,
        grpc_credentials=parsed(flags, "ssl_config_file", read_ssl),
        batcher=batcher(flags),
    )


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
