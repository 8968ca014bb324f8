"""Many times the load that can be sustained: refusals at once, and normal service right after."""

import json
import threading
import time
from collections import Counter
from http.client import HTTPConnection
from statistics import median

import grpc
import pytest
import tensorflow as tf
from tensorflow_serving.apis import predict_pb2, prediction_service_pb2_grpc

from keras_emr_serving.server.batching import Batcher
from keras_emr_serving.server.config import store_models
from keras_emr_serving.server.server import Options, Server
from keras_emr_serving.server.text_protos import Batching
from tests.serving import toy

BUSY = 0.02  # seconds of work for one request, on one thread: 50 a second can be sustained
CLIENTS = 24
REST_REFUSAL = {"error": "Too many requests are waiting"}


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("slow")
    toy.build_slow(folder / "m" / "1")
    return folder


class Rest:
    """One client: its connection is kept."""

    refusal = "503"

    def __init__(self, server):
        self._connection = HTTPConnection("127.0.0.1", server.rest_port, timeout=30)

    def ask(self):
        """The code of the answer, or of the refusal, which must be a clear one."""
        self._connection.request("POST", "/v1/models/m:predict", f'{{"instances": [{BUSY}]}}')
        answer = self._connection.getresponse()
        content = json.loads(answer.read())
        if answer.status == 200:
            return "OK"
        assert content == REST_REFUSAL or "queue" in content["error"], content
        return str(answer.status)

    def close(self):
        self._connection.close()


class Grpc:
    refusal = "RESOURCE_EXHAUSTED"

    def __init__(self, server):
        options = [("grpc.use_local_subchannel_pool", 1)]  # a connection of its own
        self._channel = grpc.insecure_channel(f"127.0.0.1:{server.grpc_port}", options)
        self._stub = prediction_service_pb2_grpc.PredictionServiceStub(self._channel)
        self._request = predict_pb2.PredictRequest()
        self._request.model_spec.name = "m"
        self._request.inputs["x"].CopyFrom(tf.make_tensor_proto([BUSY]))

    def ask(self):
        try:
            self._stub.Predict(self._request, timeout=30)
        except grpc.RpcError as error:
            return error.code().name
        return "OK"

    def close(self):
        self._channel.close()


def latency(kind, server, count=10):
    client = kind(server)
    client.ask()
    times = []
    for _ in range(count):
        began = time.monotonic()
        assert client.ask() == "OK"
        times.append(time.monotonic() - began)
    client.close()
    return median(times)


def flood(kind, server, seconds):
    """All clients ask without a pause; (code, seconds that it took) of every answer, or errors."""
    seen, end = [], time.monotonic() + seconds

    def work():
        client = kind(server)
        try:
            while time.monotonic() < end:
                began = time.monotonic()
                seen.append((client.ask(), time.monotonic() - began))
        except BaseException as error:
            seen.append((repr(error), 0.0))
        finally:
            client.close()

    threads = [threading.Thread(target=work) for _ in range(CLIENTS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return seen


def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096 / 2**20


def overload(kind, server, seconds):
    """Flood it twice: counts by code of the second time, when nothing is new to the process."""
    usual = latency(kind, server)
    flood(kind, server, min(seconds, 2.0))
    before = resident()
    seen = flood(kind, server, seconds)
    ended = time.monotonic()
    codes = Counter(code for code, _ in seen)
    while latency(kind, server, 3) > 2 * usual + 0.05:
        assert time.monotonic() - ended < 5, "it does not recover"
    assert resident() - before < 48
    # None waited longer than those that may be before it, with much to spare for a busy machine.
    assert max(took for code, took in seen if code == "OK") < 10 * 8 * BUSY + 5
    assert codes["OK"] >= 0.2 * seconds / BUSY
    return codes


@pytest.mark.parametrize("kind", [Rest, Grpc])
@pytest.mark.parametrize(
    "seconds",
    [0.6, pytest.param(30.0, marks=[pytest.mark.slow, pytest.mark.long])],
    ids=["briefly", "half a minute"],
)
def test_overload(store, kind, seconds):
    options = Options(rest_port=0, grpc_port=0, threads=1, max_pending=8)
    with Server(store_models(store), options) as server:
        codes = overload(kind, server, seconds)
        assert set(codes) == {"OK", kind.refusal}
        if seconds > 10:
            assert sum(codes.values()) > 10 * seconds / BUSY, "not ten times what can be sustained"


@pytest.mark.parametrize("kind", [Rest, Grpc])
def test_overload_of_the_batching_queue(store, kind):
    """More places than the queue of batches has: it is the queue that refuses."""
    settings = Batching(max_batch_size=1, max_enqueued_batches=4, threads=1)

    def batcher(servable):
        made = Batcher(servable, settings)
        return made.run, made.stop

    options = Options(rest_port=0, grpc_port=0, threads=16, batcher=batcher)
    with Server(store_models(store), options) as server:
        codes = overload(kind, server, 0.6)
    assert set(codes) == {"OK", "503" if kind is Rest else "UNAVAILABLE"}
