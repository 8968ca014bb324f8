"""What one client, or many, can take of the server's memory and time over REST."""

import base64
import json
import socket
import struct
import time
import zlib
from concurrent.futures import ThreadPoolExecutor

import pytest
import requests

from keras_emr_serving.server.config import store_models
from keras_emr_serving.server.server import Options, Server
from tests.serving import toy
from tests.serving.managing import until

GZIP = {"Content-Encoding": "gzip"}


@pytest.fixture(scope="module")
def slow(tmp_path_factory):
    folder = tmp_path_factory.mktemp("slow")
    toy.build_slow(folder / "m" / "1")
    return folder


@pytest.fixture
def serve(slow):
    """Start a server of the slow model, REST alone; its address, and what it counts."""
    started = []

    def start(**options):
        server = Server(store_models(slow), Options(rest_port=0, grpc_port=None, **options))
        started.append(server.start())
        url = f"http://127.0.0.1:{server.rest_port}/v1/models/m:predict"
        return url, server._rest._waiting

    yield start
    for server in started:
        server.stop()


def body(seconds, size=0):
    """A request that keeps the model busy; what follows the JSON value is ignored."""
    return f'{{"instances": [{seconds}]}}'.encode().ljust(size)


def post(url, data, **options):
    answer = requests.post(url, data=data, timeout=30, **options)
    return answer.status_code, answer.json()


def test_the_sum_of_waiting_bodies_is_bounded(serve):
    url, waiting = serve(max_body=1 << 20, max_waiting=2 << 20, threads=2)
    with ThreadPoolExecutor(2) as pool:
        held = [pool.submit(post, url, body(1.0, 1 << 20)) for _ in range(2)]
        until(lambda: waiting.bytes == 2 << 20)
        error = {"error": "Too many bytes of requests are waiting"}
        assert post(url, body(0.0, 1000)) == (503, error)
        packed = zlib.compress(body(0.0, 1 << 18), wbits=31)
        assert post(url, packed, headers=GZIP) == (503, error)
        assert requests.get(url.removesuffix(":predict"), timeout=30).status_code == 200
        assert [one.result()[0] for one in held] == [200, 200]
    until(lambda: (waiting.bytes, waiting.requests) == (0, 0))
    assert post(url, body(0.0, 1000))[0] == 200


def test_a_body_without_a_length_is_counted_as_it_comes(serve):
    url, waiting = serve(max_body=1 << 20, max_waiting=1 << 18)
    chunks = iter([body(0.0), *[b" " * 65536] * 8])
    assert post(url, chunks)[0] == 503
    until(lambda: waiting.bytes == 0)


@pytest.mark.parametrize("size", [1 << 20, 20 << 20], ids=["1 MiB", "20 MiB"])
def test_a_body_that_is_too_large_gets_its_answer(serve, size):
    url, _ = serve(max_body=(1 << 20) - 1 if size == 1 << 20 else 8 << 20)
    status, content = post(url, body(0.0, size))
    assert status == 400 and content["error"].startswith("Request body is larger than ")


def connect(url):
    host, port = url.split("/")[2].split(":")
    return socket.create_connection((host, int(port)), timeout=10)


def test_a_body_that_comes_too_slowly_is_given_up(serve):
    url, waiting = serve(rest_timeout_ms=300)
    with connect(url) as client:
        client.sendall(
            b"POST /v1/models/m:predict HTTP/1.1\r\nHost: x\r\nContent-Length: 99\r\n\r\n{"
        )
        began = time.monotonic()
        with client.makefile("rb") as answer:
            text = answer.read()  # until it is closed
        assert text.startswith(b"HTTP/1.1 504 ") and b'"error"' in text
        assert time.monotonic() - began < 8
    assert waiting.requests == 0


@pytest.mark.parametrize("head", [b"", b"POST /v1/models/m:pre"], ids=["nothing", "half a line"])
def test_a_head_that_never_ends_is_given_up(serve, head):
    url, _ = serve(rest_timeout_ms=300)
    with connect(url) as client:
        client.sendall(head)
        began = time.monotonic()
        try:
            while time.monotonic() - began < 8:
                client.settimeout(0.05)
                try:
                    assert client.recv(65536) == b""
                    break
                except TimeoutError:
                    if head:
                        client.sendall(b"x")  # slowly, but never silent
        except ConnectionError:
            pass
        assert time.monotonic() - began < 8


def test_a_connection_is_kept_for_the_next_request(serve):
    url, _ = serve(rest_timeout_ms=500)
    with requests.Session() as session:
        for _ in range(4):  # longer than one request may take
            assert session.post(url, data=body(0.0), timeout=30).status_code == 200
            time.sleep(0.2)
        (adapter,) = {session.get_adapter(url)}
        (pool,) = adapter.poolmanager.pools._container.values()
        assert pool.num_connections == 1


def test_a_request_whose_client_has_gone_is_not_run(serve):
    url, waiting = serve(threads=1)
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(post, url, body(1.5))
        until(lambda: waiting.requests == 1)
        with connect(url) as client:
            data = body(10.0)
            head = f"POST /v1/models/m:predict HTTP/1.1\r\nHost: x\r\nContent-Length: {len(data)}"
            client.sendall(head.encode() + b"\r\n\r\n" + data)
            until(lambda: waiting.requests == 2)
        until(lambda: waiting.requests == 1)
        assert not first.done()
        began = time.monotonic()
        assert post(url, body(0.0))[0] == 200
        assert time.monotonic() - began < 8  # not behind the ten seconds
        assert first.result()[0] == 200


def test_what_waits_too_long_is_not_run_at_all(serve):
    url, waiting = serve(threads=1, rest_timeout_ms=1500)
    with ThreadPoolExecutor(8) as pool:
        codes = [pool.submit(post, url, body(0.4)) for _ in range(8)]
        codes = [one.result()[0] for one in codes]
    assert set(codes) == {200, 504}
    until(lambda: waiting.requests == 0, seconds=2)
    assert post(url, body(0.0))[0] == 200


def peak():
    """The most memory that this process has had since the last call, in MiB."""
    with open("/proc/self/status") as file:
        (line,) = [one for one in file if one.startswith("VmHWM")]
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    return int(line.split()[1]) / 1024


def gzip_bomb(mebibytes):
    """So many MiB of spaces, a thousandth of it packed."""
    packer = zlib.compressobj(9, wbits=31)
    blank = b" " * (1 << 20)
    first = packer.compress(blank) + packer.flush(zlib.Z_FULL_FLUSH)
    return first + (packer.compress(blank) + packer.flush(zlib.Z_FULL_FLUSH)) * (mebibytes - 1)


def test_gzip_bombs_are_stopped_while_they_are_unpacked(serve):
    """Eight at a time, each 1 MiB that would become 1 GiB."""
    url, waiting = serve(max_body=16 << 20)
    bomb = gzip_bomb(1024)
    assert len(bomb) < 3 << 20
    try:
        before = peak() and peak()
    except OSError:
        pytest.skip("no memory figures here")
    with ThreadPoolExecutor(8) as pool:
        codes = [pool.submit(post, url, bomb, headers=GZIP) for _ in range(8)]
        codes = [one.result()[0] for one in codes]
    assert set(codes) <= {400, 503} and 400 in codes
    # The bound on all together is 64 MiB, and joining a body's parts takes its size once more.
    assert peak() - before < 200
    until(lambda: waiting.bytes == 0)
    assert post(url, zlib.compress(body(0.0), wbits=31), headers=GZIP)[0] == 200


def test_what_follows_the_end_of_a_gzip_body_is_refused(serve):
    url, _ = serve()
    packed = zlib.compress(body(0.0), wbits=31)
    status, content = post(url, packed + b"x" * 100_000, headers=GZIP)
    assert status == 400 and "there is more after its end" in content["error"]


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """The address of an exported classifier of 4 x 4 images, with its ``image_bytes``."""
    import keras

    from keras_emr_serving.export import savedmodel
    from keras_emr_serving.export.signatures import Served

    folder = tmp_path_factory.mktemp("photographs")
    flat = [keras.Input((4, 4, 1)), keras.layers.Flatten(), keras.layers.Dense(2)]
    savedmodel.write(
        Served(keras.Sequential(flat), (4, 4, 1), ("a", "b")), folder / "p" / "1", False
    )
    with Server(store_models(folder), Options(rest_port=0, grpc_port=None)) as server:
        yield f"http://127.0.0.1:{server.rest_port}/v1/models/p:predict"


def png(width, height, rows=None):
    def chunk(kind, data):
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    data = zlib.compress(bytes(1 << 20) * 64 if rows is None else rows)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")
    )


def jpeg(width=None, height=None):
    """A gray image of 4 x 4; its header may claim another size."""
    import tensorflow as tf

    data = bytearray(tf.io.encode_jpeg(tf.zeros((4, 4, 1), tf.uint8)).numpy())
    if width:
        at = data.index(b"\xff\xc0") + 5
        data[at : at + 4] = struct.pack(">HH", height, width)
    return bytes(data)


def test_image_bombs(photographs):
    """Small files that claim to be huge, or unpack to more than they claim."""

    def ask(*files):
        rows = [{"b64": base64.b64encode(data).decode()} for data in files]
        return post(photographs, json.dumps({"signature_name": "image_bytes", "instances": rows}))

    good = png(4, 4, bytes(5 * 4))
    try:
        before = peak() and peak()
    except OSError:
        before = None
    bombs = [
        *(png(60_000, 60_000), png(2**31 - 1, 2**31 - 1), png(2**32 - 1, 1), png(0, 5)),
        *(
            jpeg(65_500, 65_500),
            jpeg(0xFFFF, 1)[:40],
            good[:30],
            good[:-20],
            jpeg()[:50],
            b"GIF89a",
        ),
        b"",
    ]
    for bomb in bombs:
        for files in ([bomb], [good, bomb, good]):
            status, content = ask(*files)
            assert status == 400 and set(content) == {"error"}, (bomb[:40], status, content)
    for fine in (good, jpeg(), png(4, 4)):  # the last with 64 MiB of pixels that nobody wants
        status, content = ask(fine)
        assert status == 200, content
    assert before is None or peak() - before < 300
