"""``keras-emr serve``: what it prints, how it ends, and every mistake in one line."""

import importlib.util
import json
import re
import signal
import socket
import subprocess
import time
from contextlib import contextmanager
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


@contextmanager
def serving(*arguments):
    """The command in a process of its own, once it says where it listens."""
    process = subprocess.Popen(
        command("serve", "--rest-api-port", 0, "--port", 0, *arguments),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=clean_environment(),
    )
    try:
        lines = []
        while not lines or "Ctrl-C" not in lines[-1]:
            lines.append(process.stdout.readline())
            assert lines[-1], process.stderr.read()
        rest, grpc = re.findall(r"127\.0\.0\.1:(\d+)", "".join(lines))
        url = f"http://127.0.0.1:{rest}"
        yield SimpleNamespace(process=process, out=lines, url=url, grpc=int(grpc))
    finally:
        process.kill()
        process.communicate()


def end(process, number):
    """Stop it by a signal: what it wrote to stderr."""
    process.send_signal(number)
    out, err = process.communicate(timeout=30)
    assert (process.returncode, out) == (0, "")
    return err


def predict(url, body=BODY):
    return requests.post(f"{url}:predict", data=body, timeout=30)


def test_it_serves_until_ctrl_c(store):
    """And all that it prints: TensorFlow's greetings are not among it."""
    with serving(store, "--quiet") as running:
        assert running.out[0] == "serving m version 1\n"
        text = "In production, serve the same folders with TensorFlow Serving."
        assert text in running.out[-1] and len(running.out) == 4
        answer = predict(f"{running.url}/v1/models/m")
        assert answer.json() == {"predictions": [[9.0, 12.0]]}
        with socket.create_connection(("127.0.0.1", running.grpc), timeout=10):
            pass
        assert end(running.process, signal.SIGINT) == "stopped\n"


def configured(path, name="m", label=None):
    labels = f'version_labels {{ key: "{label}" value: 1 }}' if label else ""
    return f'config {{ name: "{name}" base_path: "{path}" model_platform: "tensorflow" {labels} }}'


def write(file, *models):
    file.write_text(f"model_config_list {{ {' '.join(models)} }}")
    return file


@pytest.fixture
def broken(tmp_path):
    """The folder of a model that cannot be loaded."""
    (tmp_path / "bad" / "1").mkdir(parents=True)
    (tmp_path / "bad" / "1" / "saved_model.pb").write_bytes(b"no model")
    return tmp_path / "bad"


def until_ok(url):
    limit = time.monotonic() + 20
    while predict(url).status_code != 200:
        assert time.monotonic() < limit
        time.sleep(0.05)


@pytest.mark.slow
def test_all_files_and_a_model_that_cannot_be_loaded(store, broken, tmp_path):
    path, bad = store / "m", configured(broken, "bad")
    config = write(tmp_path / "models.config", configured(path, "first", "stable"), bad)
    batching, monitoring = tmp_path / "batching.txt", tmp_path / "monitoring.txt"
    batching.write_text("max_batch_size { value: 4 } batch_timeout_micros { value: 1000 }")
    monitoring.write_text('prometheus_config { enable: true path: "/monitoring/mine" }')
    with serving(
        *("--model-config-file", config, "--model-config-file-poll-wait-seconds", 0.05),
        *("--file-system-poll-wait-seconds", 0.05, "--allow-version-labels-for-unavailable-models"),
        *("--enable-batching", "--batching-parameters-file", batching),
        *("--monitoring-config-file", monitoring),
    ) as running:
        models = f"{running.url}/v1/models"
        assert running.out[0] == "serving first version 1\n"
        status = requests.get(f"{models}/bad", timeout=30).json()["model_version_status"]
        assert status[0]["state"] == "END" and status[0]["status"]["error_message"]
        assert requests.get(f"{running.url}/monitoring/mine", timeout=30).status_code == 200
        usual = requests.get(f"{running.url}/monitoring/prometheus/metrics", timeout=30)
        assert usual.status_code == 404
        large = predict(f"{models}/first", json.dumps({"instances": [[1, 1, 1]] * 5}))
        assert large.status_code == 400
        assert "larger than maximum input batch size 4" in large.json()["error"]
        config.write_text("nonsense {")  # a mistake leaves things as they are
        time.sleep(0.3)
        assert predict(f"{models}/first/labels/stable").status_code == 200
        write(config, configured(path, "second"))
        until_ok(f"{models}/second")
        write(config, configured(path, "second", "canary"))
        until_ok(f"{models}/second/labels/canary")
        assert predict(f"{models}/first").status_code == 404
        err = end(running.process, signal.SIGTERM)
    assert "Traceback" not in err and err.endswith("\nstopped\n")
    assert "\nnot served: bad: version 1: " in err
    assert "model bad version 1: cannot be loaded, tried again in 60 s: " in err
    assert f"{config}: INVALID_ARGUMENT: not a ModelServerConfig" in err
    assert "model second version 1: unloaded" in err


def test_labels_at_the_start_need_a_flag(store, tmp_path, capfd):
    config = write(tmp_path / "models.config", configured(store / "m", label="stable"))
    ports = ("--rest-api-port", "off", "--port", "off")
    result = call(capfd, "serve", "--model-config-file", config, "--quiet", *ports)
    flag = "--allow-version-labels-for-unavailable-models"
    text = "version 1 of model m, which is not currently available for inference"
    assert_error(result, 3, "--model-config-file: Request to assign label to ", text, flag)


def test_nothing_to_serve_is_an_error(broken, capfd):
    result = call(capfd, "serve", broken, "--rest-api-port", 0, "--port", 0, "--quiet")
    assert result.code == 3 and result.out == "" and "Traceback" not in result.err
    last = result.err.splitlines()[-1]
    assert last.startswith("Error: no model can be served. bad: version 1: ")


@pytest.mark.parametrize("flag", ["--rest-api-port", "--port"])
def test_a_port_in_use(store, capfd, flag):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        other = "--port" if flag == "--rest-api-port" else "--rest-api-port"
        result = call(capfd, "serve", store, flag, port, other, "off", "--quiet")
    assert_error(result, 3, f"{flag}: cannot listen there: Address already in use", str(port))


@pytest.mark.parametrize("flag", ["--rest-api-port", "--port"])
def test_a_host_that_is_none(store, capfd, flag):
    other = "--port" if flag == "--rest-api-port" else "--rest-api-port"
    result = call(capfd, "serve", store, "--host", "no host", flag, 0, other, "off", "--quiet")
    assert_error(result, 3, "--host: cannot listen there: ", "no host:0")


CONFIG = 'model_config_list { config { name: "m" base_path: "%s" model_platform: "tensorflow" } }'


@pytest.mark.parametrize(
    ("flag", "text", "fragments"),
    [
        ("--model-config-file", "nonsense", ["not a ModelServerConfig"]),
        ("--model-config-file", "model_config_list {}", ["it names no model"]),
        ("--model-config-file", "", ["it has no model_config_list"]),
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
    for default in ("8501", "8500", "127.0.0.1", "30000", "64", "1.0", "60000000"):
        assert f"[default: {default}" in " ".join(result.out.split())
