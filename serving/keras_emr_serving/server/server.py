"""The server: models, the REST port, the gRPC port and the watch over the folders."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from keras_emr_serving.server.config import CONFIG, ModelConfig, followed_store, read_config
from keras_emr_serving.server.listen import bind, require_free
from keras_emr_serving.server.manager import Manager
from keras_emr_serving.server.metrics import Metrics
from keras_emr_serving.server.rest import METRICS_PATH, RestApi
from keras_emr_serving.server.servable import disable_xla
from keras_emr_serving.server.status import ServingError

log = logging.getLogger("keras_emr_serving")
_RETRY_STEP = 1.0  # seconds between looks at what could not be loaded, when folders are not polled


@dataclass
class Options:
    """How to serve. A port of 0 takes any free one; ``None`` switches that API off.

    ``max_body`` bounds one REST request, ``max_waiting`` all of them together (``None``: four of
    the largest), ``max_message`` one gRPC message, all in bytes; ``max_pending`` how many requests
    may be under way or waiting, for each API; ``threads`` how many of them are worked on.
    ``store`` or ``config_file``: what to read again every ``config_poll_seconds`` (0: never).
    """

    host: str = "127.0.0.1"
    rest_port: int | None = 8501
    grpc_port: int | None = 8500
    rest_timeout_ms: int = 30_000
    max_body: int = 64 << 20
    max_waiting: int | None = None
    max_message: int = 2**31 - 1
    threads: int = 16
    max_pending: int = 256
    poll_seconds: float = 1.0
    store: Path | None = None
    config_file: Path | None = None
    config_poll_seconds: float = 0.0
    early_labels: bool = False
    load_retries: int = 5
    load_retry_seconds: float = 60.0
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
            retries=self.options.load_retries,
            retry_seconds=self.options.load_retry_seconds,
        )
        self._stopping = threading.Event()
        self._threads: list[threading.Thread] = []
        self._uvicorn = self._grpc = self._rest = None
        self._config_trouble = ""
        self.rest_port = self.grpc_port = None

    def start(self) -> Server:
        """Bind the ports, load the models, then answer. Returns itself."""
        bound = None
        try:
            if self.options.rest_port is not None:
                bound = bind(self.options.host, self.options.rest_port)
            if self.options.grpc_port is not None:
                self._make_grpc()
            self.xla_disabled = disable_xla()
            self.manager.start()
            if bound is not None:
                self._start_rest(bound)
            if self._grpc is not None:
                self._grpc.start()
        except BaseException:
            self.stop()
            if bound is not None:
                bound.close()
            raise
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

        from keras_emr_serving.server.http import BoundedProtocol

        options = self.options
        timeout = options.rest_timeout_ms / 1000
        self._rest = RestApi(
            self.manager,
            self.metrics,
            max_body=options.max_body,
            max_waiting=options.max_waiting,
            timeout=timeout,
            threads=options.threads,
            max_pending=options.max_pending,
            metrics_path=options.metrics_path,
        )
        config = uvicorn.Config(
            self._rest.app,
            http=BoundedProtocol.with_timeout(timeout),
            ws="none",
            log_config=None,  # logging is for the application to set up
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

        require_free("gRPC", self.options.host, self.options.grpc_port)
        self._grpc, self.grpc_port = make_server(self.manager, self.metrics, self.options)

    def _watch(self):
        """Look at the folders, and at the config file if that was asked for, until stopped."""
        options = self.options
        jobs = [(options.poll_seconds, self.manager.poll)]
        if not options.poll_seconds:
            jobs = [(_RETRY_STEP, self.manager.retry)]
        if (options.store or options.config_file) and options.config_poll_seconds:
            jobs.append((options.config_poll_seconds, self._reread))
        due = [time.monotonic() + every for every, _ in jobs]
        while not self._stopping.wait(max(0.0, min(due) - time.monotonic())):
            for i, (every, job) in enumerate(jobs):
                if time.monotonic() < due[i]:
                    continue
                try:
                    job()
                except Exception:
                    log.exception("looking for new versions failed")
                due[i] = time.monotonic() + every

    def _reread(self):
        """Take over the store or the config file where it differs from what is in force.

        What is refused is tried again every time: the reason may pass without a change of the file.
        """
        store, trouble = self.options.store, ""
        path = self.options.config_file if store is None else store / CONFIG
        try:
            if self.manager.follow(
                lambda: followed_store(store) if store else read_config(path.read_text())
            ):
                log.info("took over %s", path)
        except ServingError as error:
            trouble = str(error)
        except (OSError, UnicodeDecodeError) as error:
            trouble = f"cannot be read: {getattr(error, 'strerror', None) or 'not a text file'}"
        if trouble and trouble != self._config_trouble:
            log.error("%s: %s", path, trouble)
        self._config_trouble = trouble
