"""The REST API: TensorFlow Serving's routes on an ASGI application."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from urllib.parse import unquote

from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from keras_emr_serving.server import inference, json_response, metrics
from keras_emr_serving.server.bodies import Waiting, drain, read_body
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
_LARGE = 1 << 20  # bytes of JSON, which take many times their size while they are read
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
        max_waiting: largest sum of them that may be under way or waiting; further ones get 503.
            ``None``: four times ``max_body``.
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
        max_waiting: int | None = None,
        timeout: float = 30.0,
        threads: int = 16,
        max_pending: int = 256,
        metrics_path: str | None = METRICS_PATH,
    ):
        self._manager, self._metrics = manager, counters
        self._max_body, self._timeout, self._metrics_path = max_body, timeout, metrics_path
        self._waiting = Waiting(max_pending, 4 * max_body if max_waiting is None else max_waiting)
        self._one_large = threading.Lock()
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
        end = time.monotonic() + self._timeout
        try:
            async with asyncio.timeout(self._timeout):
                text = await self._answer(request, path, end)
            return Response(text, media_type="application/json")
        except ClientDisconnect:
            return Response(status_code=499)
        except TimeoutError:
            error = _timed_out()
        except Exception as found:
            error = from_exception(found)
            if error.code == "INTERNAL" and found is not error and not hasattr(found, "error_code"):
                log.exception("request failed: %s %s", request.method, path)
            await drain(request, 4 * self._max_body)
        text = json_response.error_text(error.message)
        return Response(_encode(text), error.http_status, media_type="application/json")

    async def _answer(self, request, path, end):
        if request.method == "GET":  # quick, and wanted most when all else waits
            return self.answer("GET", path, b"", end)
        place, job = self._waiting.enter(), None
        try:
            body = await read_body(request, place, self._max_body)
            job = self._pool.submit(self.answer, request.method, path, body, end)
        finally:
            if job is None:
                place.leave()
        loop = asyncio.get_running_loop()
        # One that is given up still takes its place until it ends.
        job.add_done_callback(lambda _: _call(loop, place.leave))
        done, gone = asyncio.wrap_future(job), asyncio.ensure_future(_disconnected(request))
        try:
            await asyncio.wait({done, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not done.done():
                raise ClientDisconnect
            return done.result()
        finally:
            gone.cancel()
            done.cancel()  # and the job, unless it has begun

    def answer(self, method: str, path: str, body: bytes, end: float) -> bytes:
        """The text that answers one request by the time ``end``. Raises :class:`ServingError`."""
        if time.monotonic() >= end:  # it has waited too long: nobody is there to take the answer
            raise _timed_out()
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
                return _encode(self._counted(handlers[verb], verb, target, body, end))
        status = _STATUS.fullmatch(path)
        if method == "GET" and status:
            name, version, label, wants_metadata = status.groups()
            if not name:
                raise invalid("Missing model name in request.")
            target = (unquote(name), *_version(version, label))
            if not wants_metadata:  # of all versions: TF Serving leaves a label out of account
                return status_text(self._manager.status(*target[:2])).encode()
            with self._manager.use(*target) as used:
                return metadata_text(target[0], used).encode()
        raise invalid(f"Malformed request: {method} {path}")

    def _counted(self, handler, verb, target, body, end):
        start, code = time.perf_counter(), "OK"
        try:
            return handler(target, body, end)
        except Exception as error:
            code = from_exception(error).code
            raise
        finally:
            # Any name may be asked for; only those of models get a time series.
            if self._manager.knows(target[0]):
                elapsed = (time.perf_counter() - start) * 1e6
                self._metrics.request(target[0], verb.capitalize(), "REST", code, elapsed)

    def _predict(self, target, body, end):
        with _Held(self._manager, target) as held:
            with self._reading(body):
                request = read_predict(body, held.input_types)
            outputs = inference.predict(
                _limited(held.used, end), request.signature_name, request.inputs
            )
            self._metrics.examples(target[0], max(map(_rows, request.inputs.values())))
        return (json_response.write_rows if request.row else json_response.write_columns)(outputs)

    def _classify(self, target, body, end):
        return json_response.write_classes(self._examples(inference.classify, target, body, end))

    def _regress(self, target, body, end):
        return json_response.write_values(self._examples(inference.regress, target, body, end))

    def _examples(self, infer, target, body, end):
        with self._reading(body):
            request = read_examples(body)
        with self._manager.use(*target) as used:
            found = infer(_limited(used, end), request.signature_name, request.examples)
        self._metrics.examples(target[0], len(request.examples))
        return found

    def _reading(self, body):
        """One large body at a time; it would not be faster beside another."""
        return self._one_large if len(body) > _LARGE else contextlib.nullcontext()


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


def _timed_out():
    return ServingError("DEADLINE_EXCEEDED", "Timed out waiting for the model")


def _limited(used, end):
    """The model, to be given up when ``end`` comes."""
    left = end - time.monotonic()
    if left <= 0:
        raise _timed_out()
    return replace(used.model, timeout_ms=max(1, int(left * 1000)))


async def _disconnected(request):
    """Ends when the client has gone; its request has been read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _call(loop, function):
    with contextlib.suppress(RuntimeError):  # the loop has ended
        loop.call_soon_threadsafe(function)


def _encode(text):
    return text.encode(errors="surrogateescape")
