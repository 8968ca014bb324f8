"""The server: models, the REST port, the gRPC port and the watch over the folders."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from keras_emr_serving.server.config import ModelConfig, read_config
from keras_emr_serving.server.listen import bind
from keras_emr_serving.server.manager import Manager
from keras_emr_serving.server.metrics import Metrics
from keras_emr_serving.server.rest import METRICS_PATH, RestApi
from keras_emr_serving.server.servable import disable_xla
from keras_emr_serving.server.status import ServingError

log = logging.getLogger("keras_emr_serving")


@dataclass
class Options:
    """How to serve. A port of 0 takes any free one; ``None`` switches that API off."""

    host: str = "127.0.0.1"
    rest_port: int | None = 8501
    grpc_port: int | None = 8500
    rest_timeout_ms: int = 30_000
    max_body: int = 64 << 20
    threads: int = 16
    max_pending: int = 256
    poll_seconds: float = 1.0
    config_file: Path | None = None
    config_poll_seconds: float = 0.0
    early_labels: bool = False
    metrics_path: str | None = METRICS_PATH
    batcher: Callable | None = None
    grpc_credentials: object | None = None
    health: bool = True


class Server:
    """A development server. Use as a context manager, or :meth:`start` and :meth:`stop`.

    Args:
        models: what to serve.
        options: ports, limits and files.

    Raises:
        CannotListen: a port that cannot be had.
        ServingError: a label for a version that is not available.
    """

    def __init__(self, models: Iterable[ModelConfig], options: Options | None = None):
        self.options = options or Options()
        self.metrics = Metrics()
        self.manager = Manager(
            models,
            self.metrics,
            batcher=self.options.batcher,
            early_labels=self.options.early_labels,
        )
        self._stopping = threading.Event()
        self._threads: list[threading.Thread] = []
        self._uvicorn = self._grpc = self._rest = None
        self.rest_port = self.grpc_port = None

    def start(self) -> Server:
        """Bind the ports, load the models, then answer. Returns itself."""
        sockets = {}
        try:
            if self.options.rest_port is not None:
                sockets["rest"] = bind(self.options.host, self.options.rest_port)
            if self.options.grpc_port is not None:
                self._make_grpc()
            self.xla_disabled = disable_xla()
            self.manager.start()
        except BaseException:
            for one in sockets.values():
                one.close()
            if self._grpc is not None:
                self._grpc.stop(0)
            raise
        if "rest" in sockets:
            self._start_rest(sockets["rest"])
        if self._grpc is not None:
            self._grpc.start()
        self._run(self._watch)
        return self

    def stop(self) -> None:
        """Answer what is under way, then unload everything."""
        self._stopping.set()
        if self._uvicorn is not None:
            self._uvicorn.should_exit = True
        if self._grpc is not None:
            self._grpc.stop(5).wait()
        for thread in self._threads:
            thread.join(timeout=30)
        if self._rest is not None:
            self._rest.close()
        self.manager.close()

    def __enter__(self):
        return self.start()

    def __exit__(self, *details):
        self.stop()

    def _run(self, target, *arguments):
        thread = threading.Thread(target=target, args=arguments, daemon=True)
        thread.start()
        self._threads.append(thread)

    def _start_rest(self, bound):
        import uvicorn

        self._rest = RestApi(
            self.manager,
            self.metrics,
            max_body=self.options.max_body,
            timeout=self.options.rest_timeout_ms / 1000,
            threads=self.options.threads,
            max_pending=self.options.max_pending,
            metrics_path=self.options.metrics_path,
        )
        config = uvicorn.Config(
            self._rest.app,
            # Its own configuration closes handlers that are not its: absl's, and with it stderr.
            log_config=None,
            log_level="warning",
            access_log=False,
            lifespan="off",
            server_header=False,
            timeout_graceful_shutdown=5,
        )
        self._uvicorn = uvicorn.Server(config)
        self.rest_port = bound.getsockname()[1]
        self._run(self._uvicorn.run, [bound])

    def _make_grpc(self):
        from keras_emr_serving.server.grpc_api import make_server

        self._grpc, self.grpc_port = make_server(self.manager, self.metrics, self.options)

    def _watch(self):
        """Look at the folders, and at the config file if that was asked for."""
        elapsed, known = 0.0, _read(self.options.config_file)
        step = self.options.poll_seconds
        while not self._stopping.wait(step or 1.0):
            try:
                if step:
                    self.manager.poll()
                elapsed += step or 1.0
                if self.options.config_poll_seconds and elapsed >= self.options.config_poll_seconds:
                    elapsed = 0.0
                    text = _read(self.options.config_file)
                    if text is not None and text != known:
                        known = text
                        self.manager.reconfigure(read_config(text))
                        log.info("took over %s", self.options.config_file)
            except ServingError as error:
                log.error("%s: %s", self.options.config_file or "models", error)
            except Exception:
                log.exception("looking for new versions failed")


def _read(path):
    try:
        return None if path is None else path.read_text()
    except (OSError, UnicodeDecodeError):
        return None
