"""Requests that take too long, and more of them than can be answered."""

import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import requests

from keras_emr_serving.server.config import store_models
from keras_emr_serving.server.server import Options, Server
from tests.serving import toy


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("slow")
    toy.build_slow(folder / "m" / "1")
    return folder


def ask(server, seconds):
    url = f"http://127.0.0.1:{server.rest_port}/v1/models/m:predict"
    answer = requests.post(url, data=f'{{"instances": [{seconds}]}}', timeout=30)
    return answer.status_code, answer.json()


def test_a_request_that_takes_too_long_is_given_up_and_stopped(store):
    options = Options(rest_port=0, grpc_port=None, rest_timeout_ms=300, threads=1)
    with Server(store_models(store), options) as server:
        began = time.monotonic()
        status, content = ask(server, 20.0)
        assert status == 504 and set(content) == {"error"}
        assert time.monotonic() - began < 5
        # The only thread is free again, or this could not be answered.
        end = time.monotonic() + 5
        while ask(server, 0.0)[0] != 200:
            assert time.monotonic() < end
        assert ask(server, 0.0) == (200, {"predictions": [0.0]})


def test_more_requests_than_places_are_refused_at_once_and_others_answered(store):
    options = Options(rest_port=0, grpc_port=None, threads=1, max_pending=4)
    with Server(store_models(store), options) as server:
        status_url = f"http://127.0.0.1:{server.rest_port}/v1/models/m"
        with ThreadPoolExecutor(20) as pool:
            answers = [pool.submit(ask, server, 0.2) for _ in range(20)]
            time.sleep(0.3)
            began = time.monotonic()
            assert requests.get(status_url, timeout=30).status_code == 200
            assert time.monotonic() - began < 1
            codes = [answer.result() for answer in answers]
        refused = [content for status, content in codes if status == 503]
        assert {status for status, _ in codes} == {200, 503}
        assert len(refused) >= 10
        assert refused[0] == {"error": "Too many requests are waiting"}
        assert ask(server, 0.0)[0] == 200


def test_grpc_refuses_what_has_no_place(store):
    import grpc
    from tensorflow import make_tensor_proto
    from tensorflow_serving.apis import predict_pb2, prediction_service_pb2_grpc

    def request(seconds):
        made = predict_pb2.PredictRequest()
        made.model_spec.name = "m"
        made.inputs["x"].CopyFrom(make_tensor_proto([seconds]))
        return made

    options = Options(rest_port=None, grpc_port=0, threads=1, max_pending=4)
    with (
        Server(store_models(store), options) as server,
        grpc.insecure_channel(f"127.0.0.1:{server.grpc_port}") as channel,
    ):
        stub = prediction_service_pb2_grpc.PredictionServiceStub(channel)
        calls = [stub.Predict.future(request(0.3), timeout=30) for _ in range(20)]
        codes = [call.code().name for call in calls]
        assert set(codes) == {"OK", "RESOURCE_EXHAUSTED"}
        assert codes.count("OK") >= 4
        assert list(stub.Predict(request(0.0), timeout=30).outputs["y"].float_val) == [0.0]
