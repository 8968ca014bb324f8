"""Routes, statuses, bodies and limits of the REST API."""

import gzip
import json

import pytest
import requests

GOOD = '{"instances": [[1, 2, 3]]}'
ANSWER = {"predictions": [[22.0, 28.0]]}


def post(url, path, body=GOOD, **options):
    return requests.post(url + path, data=body, timeout=30, **options)


@pytest.mark.parametrize(
    "path",
    [
        "/v1/models/m:predict",
        "/v1/models/m/versions/1:predict",
        "/V1/Models/m/Versions/1:predict",
        "/v1/models/%6D:predict",
        "/v1/models/m/versions/001:predict",
    ],
)
def test_a_path_that_predicts(url, path):
    assert (post(url, path).status_code, post(url, path).json()) == (200, ANSWER)


@pytest.mark.parametrize(
    ("method", "path", "status", "text"),
    [
        ("POST", "/v1/models/no:predict", 404, "Servable not found for request: Latest(no)"),
        ("POST", "/v1/models/no:classify", 404, "Servable not found for request: Latest(no)"),
        (
            "POST",
            "/v1/models/m/versions/9:predict",
            404,
            "Servable not found for request: Specific(m, 9)",
        ),
        (
            "POST",
            "/v1/models/m/labels/foo:predict",
            400,
            "Unrecognized servable version label: foo",
        ),
        (
            "POST",
            "/v1/models/m/versions/99999999999999999999:predict",
            400,
            "Failed to convert version: 99999999999999999999 to numeric.",
        ),
        (
            "GET",
            "/v1/models/m/versions/" + "9" * 5000,
            400,
            f"Failed to convert version: {'9' * 5000} to numeric.",
        ),
        ("POST", "/v1/models/m:foo", 400, "Malformed request: POST /v1/models/m:foo"),
        ("POST", "/v1/models/m:PREDICT", 400, "Malformed request: POST /v1/models/m:PREDICT"),
        ("POST", "/v1/models/m", 400, "Malformed request: POST /v1/models/m"),
        ("PUT", "/v1/models/m:predict", 400, "Malformed request: PUT /v1/models/m:predict"),
        ("GET", "/v1/models/m:predict", 400, "Malformed request: GET /v1/models/m:predict"),
        ("GET", "/v1/", 400, "Malformed request: GET /v1/"),
        ("GET", "/v1/models", 400, "Missing model name in request."),
        ("GET", "/v1/models/no", 404, "Could not find any versions of model no"),
        ("GET", "/v1/models/m/versions/9", 404, "Could not find version 9 of model m"),
        ("GET", "/v1/models/no/metadata", 404, "Servable not found for request: Latest(no)"),
    ],
)
def test_an_error_over_http(url, method, path, status, text):
    body = '{"examples": [{}], "instances": [[1, 2, 3]]}' if method == "POST" else None
    answer = requests.request(method, url + path, data=body, timeout=30)
    assert (answer.status_code, answer.json()) == (status, {"error": text})
    assert answer.text == f'{{\n    "error": {json.dumps(text)}\n}}'
    assert answer.headers["content-type"] == "application/json"


def test_broken_json_on_an_unknown_model_is_reported_first(url):
    assert post(url, "/v1/models/no:predict", "{").status_code == 400


@pytest.mark.parametrize(
    ("verb", "text"),
    [("classify", "No signature was found with the name: nosuch")] * 1
    + [("regress", "No signature was found with the name: nosuch")],
)
def test_an_unknown_signature_of_examples(url, verb, text):
    body = '{"signature_name": "nosuch", "examples": [{"x": [1.0, 2.0, 3.0]}]}'
    answer = post(url, f"/v1/models/m:{verb}", body)
    assert (answer.status_code, answer.json()["error"]) == (400, text)


def test_status(url):
    answer = requests.get(f"{url}/v1/models/m", timeout=30)
    row = {
        "version": "1",
        "state": "AVAILABLE",
        "status": {"error_code": "OK", "error_message": ""},
    }
    assert answer.json() == {"model_version_status": [row]}
    assert answer.text.startswith('{\n "model_version_status": [\n  {\n   "version": "1"')
    assert requests.get(f"{url}/v1/models/m/versions/1", timeout=30).json() == answer.json()


def test_metadata(url):
    content = requests.get(f"{url}/v1/models/m/metadata", timeout=30).json()
    assert content["model_spec"] == {"name": "m", "signature_name": "", "version": "1"}
    signatures = content["metadata"]["signature_def"]["signature_def"]
    assert {"serving_default", "two", "classify", "__saved_model_init_op"} <= set(signatures)
    x = signatures["serving_default"]["inputs"]["x"]
    dims = [{"size": "-1", "name": ""}, {"size": "3", "name": ""}]
    assert x["dtype"] == "DT_FLOAT"
    assert x["tensor_shape"] == {"dim": dims, "unknown_rank": False}
    assert x["name"].endswith(":0")
    assert signatures["serving_default"]["method_name"] == "tensorflow/serving/predict"
    assert signatures["classify"]["method_name"] == "tensorflow/serving/classify"
    assert signatures["serving_default"]["defaults"] == {}


def test_a_path_outside_the_api_is_an_html_page(url):
    answer = requests.get(f"{url}/index.html", timeout=30)
    assert answer.status_code == 404
    assert answer.headers["content-type"].startswith("text/html")


def test_a_gzip_body(url):
    packed = {"headers": {"Content-Encoding": "gzip"}}
    answer = post(url, "/v1/models/m:predict", gzip.compress(GOOD.encode()), **packed)
    assert (answer.status_code, answer.json()) == (200, ANSWER)
    for broken in (b"no gzip", gzip.compress(GOOD.encode())[:-9]):
        assert post(url, "/v1/models/m:predict", broken, **packed).status_code == 400


def test_a_gzip_bomb_is_stopped_while_it_is_unpacked(store):
    """40 kB that would become 40 MB, under a limit of 1 MB."""
    from keras_emr_serving.server.config import store_models
    from keras_emr_serving.server.server import Options, Server

    options = Options(rest_port=0, grpc_port=None, max_body=1 << 20)
    with Server(store_models(store / "conv"), options) as server:
        url = f"http://127.0.0.1:{server.rest_port}"
        bomb = gzip.compress(b" " * (40 << 20))
        answer = post(url, "/v1/models/conv:predict", bomb, headers={"Content-Encoding": "gzip"})
        assert answer.status_code == 400
        assert "larger than 1048576 bytes" in answer.json()["error"]
        plain = post(url, "/v1/models/conv:predict", b" " * (2 << 20))
        assert plain.status_code == 400


@pytest.mark.parametrize("opening", ["[", '{"a":', '[{"b64":'])
def test_deep_nesting_is_refused(url, opening):
    answer = post(url, "/v1/models/m:predict", '{"instances": ' + opening * 200_000)
    assert answer.status_code == 400
    assert "Nested deeper" in answer.json()["error"]
    assert post(url, "/v1/models/m:predict").json() == ANSWER


def test_brackets_in_a_string_are_no_nesting(url):
    body = json.dumps({"instances": [[1, 2, 3]], "note": '[{"' * 1000})
    assert post(url, "/v1/models/m:predict", body).json() == ANSWER


@pytest.mark.parametrize("shape", [784, [784], [4, 4], [1, 1, 4, 4, 1], [4, 4, 3]])
def test_a_wrong_shape_never_reaches_a_convolution(url, shape):
    """The graph itself has no check, and some of these would end the process."""

    def nested(dims):
        return 0.5 if not dims else [nested(dims[1:]) for _ in range(dims[0])]

    body = json.dumps({"instances": [nested(shape if isinstance(shape, list) else [shape])]})
    answer = post(url, "/v1/models/conv:predict", body)
    assert answer.status_code == 400
    assert "is not compatible with expected shape [?,4,4,1]." in answer.json()["error"]
    good = json.dumps({"instances": [nested([4, 4, 1])]})
    assert post(url, "/v1/models/conv:predict", good).json() == {"predictions": [[[[2.0]] * 3] * 3]}


def test_metrics(url):
    post(url, "/v1/models/m:predict")
    post(url, "/v1/models/m:predict", "{")
    page = requests.get(f"{url}/monitoring/prometheus/metrics", timeout=30).text
    assert "# TYPE :tensorflow:serving:request_count counter" in page
    assert ':tensorflow:serving:request_count{model_name="m",status="OK"}' in page
    assert ':tensorflow:serving:request_count{model_name="m",status="INVALID_ARGUMENT"}' in page
    labels = 'API="Predict",entrypoint="REST",model_name="m"'
    assert f":tensorflow:serving:request_latency_count{{{labels}}}" in page
    assert ':tensorflow:serving:runtime_latency_bucket{API="Predict",le="10.0"' in page
    wrong = requests.get(f"{url}/monitoring/x", timeout=30)
    assert (wrong.status_code, wrong.text) == (404, "Unexpected path: /monitoring/x.")
