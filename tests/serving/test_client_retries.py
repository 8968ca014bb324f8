"""When the client asks again, when it does not, and what it says then."""

import socket
import threading

import numpy as np
import pytest

from keras_emr.errors import UserError
from keras_emr_serving import Client, ClientError
from keras_emr_serving.client.retry import Retry
from tests.serving.scripted import GOOD, METADATA, scripted

ONE = np.zeros((1, 2, 2, 1), "float32")


def client(url, times=4, **options):
    """A client that notes its pauses instead of sleeping; the pauses."""
    pauses = []
    retry = Retry(times, sleep=pauses.append, uniform=lambda low, high: high)
    return Client(url, retries=retry, **options), pauses


@pytest.mark.parametrize(
    "failure",
    [(503, {"error": "busy"}), (429, {"error": "full"}), "reset", "cut"],
    ids=["503", "429", "reset", "cut"],
)
def test_two_failures_and_then_the_answer(failure):
    with scripted(failure, failure, GOOD) as (url, seen):
        asking, pauses = client(url)
        with asking:
            outputs = asking.predict(ONE)
    assert outputs["probabilities"].tolist() == [[0.25, 0.75]]
    assert outputs["probabilities"].dtype == np.float32
    assert len(seen) == 3 and len(set(seen)) == 1
    assert pauses == [0.2, 0.4]


@pytest.mark.parametrize("status", [400, 401, 403, 404, 409, 500, 501, 502, 504])
def test_other_answers_are_final(status):
    with scripted((status, {"error": "Expecting\n tensor"}), GOOD) as (url, seen):
        asking, pauses = client(url)
        with asking, pytest.raises(ClientError) as raised:
            asking.predict(ONE)
    error = raised.value
    assert (len(seen), pauses) == (1, [])
    assert (error.status, error.message, error.url) == (status, "Expecting", f"{url}:predict")
    text = f"the server answered {status}: Expecting. Received: {url}:predict. Expected "
    assert str(error).startswith(text)
    assert error.mistake == (status < 500)
    assert error.temporary == (status in (502, 504))


def test_a_server_that_stays_busy():
    with scripted((503, {"error": "busy"})) as (url, seen):
        asking, pauses = client(url, times=6)
        with asking, pytest.raises(ClientError, match="answered 503: busy"):
            asking.predict(ONE)
    assert len(seen) == 7
    assert pauses == [0.2, 0.4, 0.8, 1.6, 3.2, 5.0]


def test_a_server_says_when_to_come_back():
    busy = (503, {"error": "busy"})
    answers = [(*busy, {"Retry-After": "3"}), (*busy, {"Retry-After": "3600"}), (*busy, {}), GOOD]
    with scripted(*answers) as (url, _):
        asking, pauses = client(url)
        with asking:
            asking.predict(ONE)
    assert pauses == [3.0, 5.0, 0.8]


def test_pauses_are_spread():
    pauses = [Retry(first=1.0, longest=8.0).pause(2) for _ in range(200)]
    assert 2 <= min(pauses) < 2.4 and 3.6 < max(pauses) <= 4


def test_an_answer_that_does_not_come_is_not_asked_for_again():
    with scripted("silence") as (url, seen):
        asking, pauses = client(url, timeout=0.3)
        with asking, pytest.raises(ClientError) as raised:
            asking.predict(ONE)
    assert (len(seen), pauses) == (1, [])
    assert raised.value.timed_out and raised.value.temporary and raised.value.status is None
    text = f"no answer: none within 0.3 s. Received: {url}:predict. Expected one in time"
    assert str(raised.value).startswith(text)


def test_nobody_is_there():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}/v1/models/m"
    asking, pauses = client(url, times=2)
    with asking, pytest.raises(ClientError) as raised:
        asking.status()
    assert pauses == [0.2, 0.4]
    assert raised.value.status is None and raised.value.temporary and not raised.value.mistake
    text = f"no answer: Connection refused. Received: {url}. Expected a server that listens there"
    assert str(raised.value).startswith(text)


@pytest.mark.parametrize(
    ("status", "expected"),
    [
        (404, "a model, version or label"),
        (403, "a request that is allowed"),
        (500, "log may say more"),
    ],
)
def test_an_error_says_what_would_be_right(status, expected):
    with scripted((status, {"error": "no\x1b[31m\r\n way!"})) as (url, _):
        with Client(url) as asking, pytest.raises(ClientError) as raised:
            asking.predict(ONE)
    text = str(raised.value)
    assert text.startswith(f"the server answered {status}: no [31m")
    assert text.isprintable() and f"Received: {url}:predict. Expected" in text
    assert expected in text


def test_a_port_that_does_not_speak_http():
    """What gRPC's port sends at once: the SETTINGS frame of HTTP/2."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        url = f"http://127.0.0.1:{listening.getsockname()[1]}/v1/models/m"

        def answer():
            with listening.accept()[0] as one:
                one.recv(4096)
                one.sendall(bytes.fromhex("00001204000000000000040040000000fe") + b"\x1b[31m\xfe\n")

        thread = threading.Thread(target=answer)
        thread.start()
        with Client(url, retries=0) as asking, pytest.raises(ClientError) as raised:
            asking.metadata()
        thread.join(10)
    assert "not HTTP. Is it the port of gRPC (grpc://)?" in str(raised.value)
    assert str(raised.value).isprintable()


def test_a_proxy_that_is_away_is_named(monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    with Client("http://h:8501/v1/models/m", retries=0) as asking:
        with pytest.raises(ClientError, match="proxy that the environment names: Connection refus"):
            asking.metadata()


@pytest.mark.parametrize(
    "answer",
    [
        (200, "hello"),
        (200, {"predictions": []}),
        (200, {"outputs": [[1.0, 0.0], [0.0, 1.0]]}),
        (200, {"outputs": 1.0}),
        (200, {"outputs": [["x", 1.0]]}),
        (200, "[" * 100_000),
        (302, "", {"Location": "/elsewhere"}),
    ],
    ids=["text", "other key", "two rows", "scalar", "not numbers", "deep", "redirect"],
)
def test_what_is_no_answer_is_an_error(answer):
    with scripted(answer, GOOD) as (url, seen):
        asking, _ = client(url)
        with asking, pytest.raises(ClientError):
            asking.predict(ONE)
    assert len(seen) == 1


def test_words_that_json_does_not_know():
    with scripted((200, '{"outputs": [[NaN, -Infinity]]}')) as (url, _):
        with Client(url) as asking:
            (row,) = asking.predict(ONE)["probabilities"]
    assert np.isnan(row[0]) and row[1] == -np.inf


def test_an_html_page_instead_of_an_error():
    page = "<html><body><h1>404</h1>\n<p>Not   Found</p></body></html>"
    with scripted((404, page)) as (url, _):
        with Client(url) as asking, pytest.raises(ClientError, match="answered 404: 404 Not Found"):
            asking.predict(ONE)


def test_headers_are_sent_with_every_request():
    import http.server
    import threading

    seen = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            seen.append(self.headers["Authorization"])
            self.send_response(401)
            self.end_headers()

        def log_message(self, *arguments):
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.handle_request, daemon=True)
    thread.start()
    url = f"http://127.0.0.1:{server.server_address[1]}/v1/models/m"
    with Client(url, headers={"Authorization": "Bearer x"}) as asking:
        with pytest.raises(ClientError, match="401"):
            asking.metadata()
    thread.join(10)
    server.server_close()
    assert seen == ["Bearer x"]


def test_the_metadata_is_asked_for_once():
    with scripted(GOOD) as (url, _), Client(url) as asking:
        first = asking.metadata()
        METADATA["model_spec"]["version"] = "8"
        try:
            assert asking.metadata() is first and first.version == 7
            assert asking.metadata(fresh=True).version == 8
        finally:
            METADATA["model_spec"]["version"] = "7"


@pytest.mark.parametrize(
    ("url", "model_url"),
    [
        ("http://h:8501/v1/models/m", "http://h:8501/v1/models/m"),
        (" http://h/v1/models/m/ ", "http://h:80/v1/models/m"),
        ("https://h/x/y/v1/models/m", "https://h:443/x/y/v1/models/m"),
        ("http://[::1]:8501/v1/models/m/versions/12", "http://[::1]:8501/v1/models/m/versions/12"),
        ("http://h:1/v1/models/a%20b/labels/c%20d", "http://h:1/v1/models/a%20b/labels/c%20d"),
        ("grpc://h/v1/models/m", "grpc://h:8500/v1/models/m"),
        ("grpcs://h:9/v1/models/m", "grpcs://h:9/v1/models/m"),
    ],
)
def test_addresses(url, model_url):
    from keras_emr_serving.client.address import parse

    assert parse(url).model_url == model_url
    assert parse(parse(url).model_url) == parse(url)


@pytest.mark.parametrize(
    "url",
    [
        *("", "m", "http://", "http://h:8501", "http://h:8501/v1/models", "ftp://h/v1/models/m"),
        *("http://h:99999/v1/models/m", "http://h/v1/models/m:predict", "http://h/v1/models/m?x=1"),
        *("http://u:p@h/v1/models/m", "http://h/v1/models/m/versions/x", "http://[h/v1/models/m"),
        "http://h/v1/models/m m",
    ],
)
def test_what_is_no_address(url):
    with pytest.raises(UserError, match=r"url: not the address of a model\. Received: .* Expected"):
        Client(url)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"timeout": 0}, "timeout: bad value. Received: 0"),
        ({"timeout": float("nan")}, "timeout: bad value"),
        ({"batch_size": 0}, "batch_size: bad value"),
        ({"retries": -1}, "retries: bad value. Received: -1"),
        ({"protocol": "soap"}, "Expected rest or grpc"),
        ({"version": 1, "label": "x"}, "Expected one"),
        ({"version": "latest"}, "version: bad value"),
        ({"version": 2**63}, "version: bad value"),
        ({"ca": "x.pem"}, "without TLS"),
        ({"key": "x.pem"}, "without its certificate"),
    ],
)
def test_options_that_mean_nothing(options, text):
    with pytest.raises(UserError, match=text):
        Client("http://h:8501/v1/models/m", **options)
