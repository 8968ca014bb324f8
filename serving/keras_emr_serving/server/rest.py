"""The REST API: TensorFlow Serving's routes on an ASGI application."""

from __future__ import annotations

import asyncio
import logging
import re
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from urllib.parse import unquote

from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from keras_emr_serving.server import inference, json_response, metrics
from keras_emr_serving.server.json_examples import read_examples
from keras_emr_serving.server.json_request import read_predict
from keras_emr_serving.server.manager import Manager
from keras_emr_serving.server.metadata import metadata_text, status_text
from keras_emr_serving.server.servable import DEFAULT_SIGNATURE
from keras_emr_serving.server.status import ServingError, from_exception, invalid

log = logging.getLogger("keras_emr_serving")
METRICS_PATH = "/monitoring/prometheus/metrics"
_NAME = r"/v1/models(?:/([^/:]+))?(?:/versions/(\d+)|/labels/([^/:]+))?"
_PREDICTION = re.compile(rf"{_NAME}:(classify|regress|predict)", re.IGNORECASE)
_STATUS = re.compile(rf"{_NAME}(/metadata)?", re.IGNORECASE)
_METHODS = ["GET", "POST", "PUT", "DELETE", "HEAD", "OPTIONS", "PATCH"]
_MAX_INT64 = 2**63 - 1
_NO_PAGE = (
    "<html><head>\n<title>404 Not Found</title>\n</head><body>\n<h1>Not Found</h1>\n"
    "</body></html>\n"
)


class RestApi:
    """Answers REST requests from what ``manager`` has loaded.

    Args:
        manager: the loaded models.
        counters: where requests are counted, and what the metrics page shows.
        max_body: largest request in bytes, before and after decompression.
        timeout: seconds after which a request is given up.
        threads: how many requests are worked on at a time.
        max_pending: how many may be under way or waiting; further ones get 503 at once.
        metrics_path: where Prometheus reads; ``None`` for nowhere.
    """

    def __init__(
        self,
        manager: Manager,
        counters: metrics.Metrics,
        max_body: int = 64 << 20,
        timeout: float = 30.0,
        threads: int = 16,
        max_pending: int = 256,
        metrics_path: str | None = METRICS_PATH,
    ):
        self._manager, self._metrics = manager, counters
        self._max_body, self._timeout, self._metrics_path = max_body, timeout, metrics_path
        self._pending, self._max_pending = 0, max_pending
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="rest")
        self.app = Starlette(routes=[Route("/{path:path}", self._handle, methods=_METHODS)])

    def close(self):
        self._pool.shutdown(wait=False, cancel_futures=True)

    async def _handle(self, request: Request) -> Response:
        path = request.scope.get("raw_path", request.url.path.encode()).decode("latin-1")
        path = path.split("?")[0]
        if path.startswith("/monitoring"):
            if self._metrics_path is None or path != self._metrics_path:
                return Response(f"Unexpected path: {path}.", 404, media_type="text/plain")
            return Response(self._metrics.text(), media_type=metrics.CONTENT_TYPE)
        if not re.match("/v1/", path, re.IGNORECASE):
            return Response(_NO_PAGE, 404, media_type="text/html")
        try:
            async with asyncio.timeout(self._timeout):
                text = await self._answer(request, path)
            return Response(text, media_type="application/json")
        except ClientDisconnect:
            return Response(status_code=499)
        except TimeoutError:
            error = ServingError("DEADLINE_EXCEEDED", "Timed out waiting for the model")
        except Exception as found:
            error = from_exception(found)
            if error.code == "INTERNAL" and found is not error and not hasattr(found, "error_code"):
                log.exception("request failed: %s %s", request.method, path)
        text = json_response.error_text(error.message)
        return Response(_encode(text), error.http_status, media_type="application/json")

    async def _answer(self, request, path):
        if request.method == "GET":  # quick, and wanted most when all else waits
            return self.answer("GET", path, b"")
        if self._pending >= self._max_pending:
            raise ServingError("UNAVAILABLE", "Too many requests are waiting")
        self._pending += 1
        job = None
        try:
            body = await self._body(request)
            loop = asyncio.get_running_loop()
            job = loop.run_in_executor(self._pool, self.answer, request.method, path, body)
            job.add_done_callback(self._finished)
        finally:
            if job is None:
                self._pending -= 1
        # One that is given up still takes its place until it ends.
        return await asyncio.shield(job)

    def _finished(self, job):
        self._pending -= 1
        if not job.cancelled():
            job.exception()

    async def _body(self, request):
        inflate = None
        encoding = request.headers.get("content-encoding", "identity").strip().lower()
        if encoding == "gzip":
            inflate = zlib.decompressobj(wbits=31)
        parts, size = [], 0
        async for chunk in request.stream():
            if inflate is not None and chunk:
                chunk = _inflate(inflate, chunk, self._max_body - size + 1)
            size += len(chunk)
            if size > self._max_body:
                raise invalid(f"Request body is larger than {self._max_body} bytes")
            parts.append(chunk)
        if inflate is not None and parts and not inflate.eof:
            raise invalid("Failed to decompress the gzip request body: it is incomplete")
        return b"".join(parts)

    def answer(self, method: str, path: str, body: bytes) -> bytes:
        """The text that answers one request. Raises :class:`ServingError`."""
        prediction = _PREDICTION.fullmatch(path)
        if method == "POST" and prediction and prediction[1]:
            name, version, label, verb = prediction.groups()
            handlers = {
                "predict": self._predict,
                "classify": self._classify,
                "regress": self._regress,
            }
            if verb in handlers:
                target = (unquote(name), *_version(version, label))
                return _encode(self._counted(handlers[verb], verb, target, body))
        status = _STATUS.fullmatch(path)
        if method == "GET" and status:
            name, version, label, wants_metadata = status.groups()
            if not name:
                raise invalid("Missing model name in request.")
            target = (unquote(name), *_version(version, label))
            if not wants_metadata:
                return status_text(self._manager.status(*target)).encode()
            with self._manager.use(*target) as used:
                return metadata_text(target[0], used).encode()
        raise invalid(f"Malformed request: {method} {path}")

    def _counted(self, handler, verb, target, body):
        start, code = time.perf_counter(), "OK"
        try:
            return handler(target, body)
        except Exception as error:
            code = from_exception(error).code
            raise
        finally:
            # Any name may be asked for; only those of models get a time series.
            if code != "NOT_FOUND":
                elapsed = (time.perf_counter() - start) * 1e6
                self._metrics.request(target[0], verb.capitalize(), "REST", code, elapsed)

    def _predict(self, target, body):
        with _Held(self._manager, target) as held:
            request = read_predict(body, held.input_types)
            outputs = inference.predict(
                self._limited(held.used), request.signature_name, request.inputs
            )
            self._metrics.examples(target[0], max(map(_rows, request.inputs.values())))
        return (json_response.write_rows if request.row else json_response.write_columns)(outputs)

    def _limited(self, used):
        return replace(used.model, timeout_ms=int(self._timeout * 1000))

    def _classify(self, target, body):
        request = read_examples(body)
        with self._manager.use(*target) as used:
            found = inference.classify(
                self._limited(used), request.signature_name, request.examples
            )
        self._metrics.examples(target[0], len(request.examples))
        return json_response.write_classes(found)

    def _regress(self, target, body):
        request = read_examples(body)
        with self._manager.use(*target) as used:
            found = inference.regress(self._limited(used), request.signature_name, request.examples)
        self._metrics.examples(target[0], len(request.examples))
        return json_response.write_values(found)


class _Held:
    """Looks a model up only once the request's JSON has been read, then holds it to the end."""

    def __init__(self, manager, target):
        self._manager, self._target = manager, target
        self._context = self.used = None

    def __enter__(self):
        return self

    def __exit__(self, *details):
        if self.used is not None:
            self._context.__exit__(*details)

    def input_types(self, signature_name):
        self._context = self._manager.use(*self._target)
        self.used = self._context.__enter__()
        name = signature_name or DEFAULT_SIGNATURE
        signature = self.used.servable.signatures.get(name)
        if signature is None:
            raise invalid(f'Serving signature name: "{name}" not found in signature def')
        return self.used.servable.types(signature)


def _rows(array):
    return len(array) if array.ndim else 1


def _version(version, label):
    digits = (version or "").lstrip("0")
    if len(digits) > 19 or int(digits or 0) > _MAX_INT64:
        raise invalid(f"Failed to convert version: {version} to numeric.")
    return (int(version) if version else None), (unquote(label) if label else None)


def _inflate(inflate, chunk, limit):
    try:
        return inflate.decompress(chunk, limit)
    except zlib.error as error:
        raise invalid(f"Failed to decompress the gzip request body: {error}") from None


def _encode(text):
    return text.encode(errors="surrogateescape")
