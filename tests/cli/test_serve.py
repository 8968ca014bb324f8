"""``keras-emr serve``: what it prints, how it ends, and every mistake in one line."""

import importlib.util
import json
import os
import re
import signal
import socket
import subprocess
import time
from types import SimpleNamespace

import pytest
import requests

from tests.cli.harness import assert_error, call, clean_environment, command, python
from tests.serving import toy

BODY = '{"instances": [[1, 1, 1]]}'


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """A store with one small model, ``m``, version 1."""
    folder = tmp_path_factory.mktemp("serve")
    toy.build_small(folder / "m" / "1")
    return folder


@pytest.fixture
def serve():
    """Start the command in a process of its own; wait until it says where it listens."""
    started = []

    def start(*arguments):
        process = subprocess.Popen(
            command("serve", "--rest-api-port", 0, "--port", 0, *arguments),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=clean_environment(),
        )
        started.append(process)
        lines = []
        while not lines or "Ctrl-C" not in lines[-1]:
            line = process.stdout.readline()
            assert line, process.stderr.read()
            lines.append(line.rstrip("\n"))
        text = "\n".join(lines)
        ports = [int(found) for found in re.findall(r"127\.0\.0\.1:(\d+)", text)]
        url = f"http://127.0.0.1:{ports[0]}/v1/models"
        return SimpleNamespace(process=process, out=text, url=url, ports=ports)

    yield start
    for process in started:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["Ctrl-C", "SIGTERM"])
def test_it_serves_until_it_is_told_to_stop(serve, store, number):
    running = serve(store)
    assert running.out.splitlines()[0] == "serving m version 1"
    assert "In production, serve the same folders with TensorFlow Serving." in running.out
    answer = requests.post(f"{running.url}/m:predict", data=BODY, timeout=30)
    assert answer.json() == {"predictions": [[9.0, 12.0]]}
    with socket.create_connection(("127.0.0.1", running.ports[1]), timeout=10):
        pass
    running.process.send_signal(number)
    _, err = running.process.communicate(timeout=30)
    assert running.process.returncode == 0
    assert err.splitlines()[-1] == "stopped"
    assert "Traceback" not in err


def test_a_config_file_is_read_again(serve, store, tmp_path):
    def text(name, label):
        return (
            f'model_config_list {{ config {{ name: "{name}" base_path: "{store}/m" '
            'model_platform: "tensorflow" '
            f'version_labels {{ key: "{label}" value: 1 }} }} }}'
        )

    config = tmp_path / "models.config"
    config.write_text(text("first", "stable"))
    poll = ("--model-config-file-poll-wait-seconds", 0.2, "--file-system-poll-wait-seconds", 0.1)
    running = serve("--model-config-file", config, *poll)
    path = f"{running.url}/first/labels/stable:predict"
    assert requests.post(path, data=BODY, timeout=30).status_code == 200
    config.write_text("nonsense {")  # a mistake leaves things as they are
    time.sleep(0.6)
    assert requests.post(path, data=BODY, timeout=30).status_code == 200
    config.write_text(text("second", "canary"))
    path = f"{running.url}/second/labels/canary:predict"
    end = time.monotonic() + 20
    while requests.post(path, data=BODY, timeout=30).status_code != 200:
        assert time.monotonic() < end
        time.sleep(0.1)
    old = requests.post(f"{running.url}/first:predict", data=BODY, timeout=30)
    assert old.status_code == 404


def test_batching(serve, store, tmp_path):
    file = tmp_path / "batching.txt"
    file.write_text("max_batch_size { value: 4 } batch_timeout_micros { value: 1000 }")
    running = serve(store, "--enable-batching", "--batching-parameters-file", file)
    answer = requests.post(f"{running.url}/m:predict", data=BODY, timeout=30)
    assert answer.json() == {"predictions": [[9.0, 12.0]]}
    large = json.dumps({"instances": [[1, 1, 1]] * 5})
    answer = requests.post(f"{running.url}/m:predict", data=large, timeout=30)
    assert answer.status_code == 400
    assert "larger than maximum input batch size 4" in answer.json()["error"]


def test_monitoring_can_be_moved_or_switched_off(serve, store, tmp_path):
    file = tmp_path / "monitoring.txt"
    file.write_text('prometheus_config { enable: true path: "/monitoring/mine" }')
    url = serve(store, "--monitoring-config-file", file).url.removesuffix("/v1/models")
    assert requests.get(f"{url}/monitoring/mine", timeout=30).status_code == 200
    assert requests.get(f"{url}/monitoring/prometheus/metrics", timeout=30).status_code == 404


def test_a_version_that_cannot_be_loaded_is_named(serve, store, tmp_path):
    bad = tmp_path / "store" / "bad" / "1"
    bad.mkdir(parents=True)
    (bad / "saved_model.pb").write_bytes(b"no model")
    os.symlink(store / "m", tmp_path / "store" / "m")
    running = serve(tmp_path / "store", "--quiet")
    assert running.out.splitlines()[0] == "serving m version 1"
    status = requests.get(f"{running.url}/bad", timeout=30).json()["model_version_status"]
    assert status[0]["state"] == "END" and status[0]["status"]["error_message"]
    running.process.terminate()
    _, err = running.process.communicate(timeout=30)
    assert "not served: bad: " in err and "model bad version 1: cannot be loaded" in err


@pytest.mark.parametrize("flag", ["--rest-api-port", "--port"])
def test_a_port_in_use(store, capfd, flag):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        other = "--port" if flag == "--rest-api-port" else "--rest-api-port"
        result = call(capfd, "serve", store, flag, port, other, "off", "--quiet")
    last = result.err.splitlines()[-1]  # before it TensorFlow and gRPC may say something
    assert result.code == 3 and result.out == ""
    assert last.startswith(f"Error: {flag}: cannot listen there: ") and str(port) in last


CONFIG = 'model_config_list { config { name: "m" base_path: "%s" model_platform: "tensorflow" } }'


@pytest.mark.parametrize(
    ("flag", "text", "fragments"),
    [
        ("--model-config-file", "nonsense", ["not a ModelServerConfig"]),
        ("--model-config-file", "model_config_list {}", ["it names no model"]),
        ("--model-config-file", CONFIG % "/no/such", ["model 'm'", "'/no/such'"]),
        ("--model-config-file", CONFIG % "here", ["absolute path", "base_path()=here"]),
        ("--model-config-file", None, ["cannot be read: No such file"]),
        ("--batching-parameters-file", "max_batch_size: 3", ["not a BatchingParameters"]),
        ("--monitoring-config-file", "prometheus {}", ["not a MonitoringConfig"]),
        ("--ssl-config-file", 'server_key: "x"', ["server_cert is missing"]),
        (
            "--ssl-config-file",
            'server_key: "x" server_cert: "y"',
            ["server_cert or server_key is not valid PEM"],
        ),
    ],
)
def test_a_file_that_is_wrong(store, tmp_path, capfd, flag, text, fragments):
    file = tmp_path / "file.txt"
    if text is not None:
        file.write_text(text)
    arguments = [] if flag == "--model-config-file" else [store, "--enable-batching"]
    result = call(capfd, "serve", *arguments, flag, file, "--quiet")
    assert_error(result, 3, flag, str(file) if text != CONFIG % "/no/such" else "", *fragments)


@pytest.mark.parametrize(
    ("make", "fragment"),
    [
        (lambda path: None, "no such folder"),
        (lambda path: path.mkdir(), "not a model store"),
        (lambda path: path.write_text("x"), "no such folder"),
        (lambda path: (path / "m" / "1").mkdir(parents=True), "not a model store"),
    ],
    ids=["missing", "empty", "a file", "half-written"],
)
def test_a_folder_that_is_no_store(tmp_path, capfd, make, fragment):
    make(tmp_path / "store")
    result = call(capfd, "serve", tmp_path / "store")
    assert_error(result, 3, "STORE: ", fragment, "Received: ")


def test_usage(store, capfd):
    for arguments in ([], [store, "--model-config-file", "x"]):
        assert_error(call(capfd, "serve", *arguments), 2, "either STORE or --model-config-file")
    assert_error(call(capfd, "serve", store, "--port", "x"), 2, "--port")
    result = call(capfd, "serve", store, "--batching-parameters-file", "x")
    assert_error(result, 3, "needs --enable-batching")


def test_packages_that_are_missing_are_named(store, capfd, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "uvicorn" else find(name)
    )
    result = call(capfd, "serve", store)
    assert_error(result, 3, "no uvicorn", 'pip install "keras-emr[serving]"')


def test_help_imports_nothing_heavy():
    code = (
        "import sys; from keras_emr_cli.main import main\n"
        "try: main(['serve', '--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'tensorflow', 'keras', 'numpy', 'grpc', 'starlette'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    result = python("-c", code)
    assert result.code == 0, result.err
    assert "TensorFlow Serving" in result.out
