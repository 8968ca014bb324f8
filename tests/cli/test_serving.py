"""`keras-emr serving`: what it prints, its exit codes, and a server that follows."""

import json
import shutil

import pytest

from keras_emr_serving.lifecycle import Store
from keras_emr_serving.server.config import followed_store, read_config
from keras_emr_serving.server.server import Options, Server
from tests.cli.harness import assert_error, call, python
from tests.serving import toy


@pytest.fixture
def store(tmp_path):
    for number in (1, 2, 3):
        (tmp_path / "m" / str(number)).mkdir(parents=True)
        if number != 3:
            (tmp_path / "m" / str(number) / "saved_model.pb").write_bytes(b"whole")
    return tmp_path


def labels(store):
    return read_config((store / "models.config").read_text())[0].labels


def test_from_the_first_version_to_the_second_and_back(store, capfd):
    result = call(capfd, "serving", "promote", store, "m", 1, "--base-path", "/models")
    assert result.code == 0 and result.out == "m: label 'stable' is on version 1\n"
    assert 'base_path: "/models/m"' in (store / "models.config").read_text()

    result = call(capfd, "serving", "promote", store, "m", "--pause", 0)
    assert result.code == 0 and "is on version 2 (was 1)" in result.out
    back = f"to go back to version 1: keras-emr serving rollback {store} m\n"
    assert result.out.endswith(back) and "--url" in result.err
    assert labels(store) == {"stable": 2, "previous": 1}

    result = call(capfd, "serving", "status", store)
    assert result.out.splitlines() == [
        "m: policy specific 1, 2",
        "  1  previous, to be served",
        "  2  stable, to be served",
        "  3  half-written",
        "  without a label clients get version 2",
    ]
    result = call(capfd, "serving", "rollback", store, "m", "--json")
    assert json.loads(result.out)["version"] == 1
    assert labels(store) == {"stable": 1, "previous": 2}
    result = call(capfd, "serving", "promote", store, "m", 1)
    assert result.out.startswith("m: label 'stable' is on version 1 already\n")
    assert labels(store) == {"stable": 1, "previous": 2}


def test_status_as_json(store, capfd):
    call(capfd, "serving", "promote", store, "m", 1)
    (model,) = json.loads(call(capfd, "serving", "status", store, "m", "--json").out)["models"]
    assert model["versions"] == {"1": True, "2": True, "3": False}
    assert model["labels"] == {"stable": 1} and model["wanted"] == [1]
    assert model["policy"] == "specific 1" and model["problems"] == []


BAD = {
    "no store": (["promote", "STORE/nosuch", "m"], 3, ["STORE: no such folder"]),
    "not a store": (["status", "STORE/m/1"], 3, ["not a model store"]),
    "missing model": (["promote", "STORE", "mm"], 3, ["unknown model", "did you mean 'm'"]),
    "missing version": (["promote", "STORE", "m", "9"], 3, ["no such version. Received: 9"]),
    "half-written": (["promote", "STORE", "m", "3"], 3, ["half-written", "saved_model.pb"]),
    "nothing before": (["rollback", "STORE", "m"], 3, ["nothing to roll back to"]),
    "status of none": (["status", "STORE", "x"], 3, ["unknown model"]),
    "version": (["promote", "STORE", "m", "one"], 2, ["one"]),
    "label": (["promote", "STORE", "m", "--label", "previous"], 3, ["--label"]),
    "base path": (["promote", "STORE", "m", "--base-path", "x"], 3, ["--base-path"]),
    "url": (["status", "STORE", "--url", "localhost"], 3, ["--url: not an address"]),
    "grpc": (["status", "STORE", "--grpc", "localhost"], 3, ["--grpc: not an address"]),
    "ca": (["status", "STORE", "--grpc", "h:1", "--grpc-ca", "no"], 3, ["--grpc-ca", "'no'"]),
    "both": (["status", "STORE", "--grpc", "h:1", "--url", "http://h"], 2, ["either"]),
    "ca alone": (["status", "STORE", "--grpc-ca", "x"], 2, ["need --grpc"]),
    "no server": (["status", "STORE", "--url", "http://127.0.0.1:9"], 1, ["127.0.0.1:9"]),
    "no such command": (["demote", "STORE"], 2, ["demote"]),
}


@pytest.mark.parametrize(("arguments", "code", "fragments"), BAD.values(), ids=BAD)
def test_bad_input_is_one_line(store, capfd, arguments, code, fragments):
    given = [one.replace("STORE", str(store)) for one in arguments]
    assert_error(call(capfd, "serving", *given), code, *fragments)
    assert not (store / "models.config").exists()


def test_a_config_with_troubles(store, capfd):
    file = store / "models.config"
    file.write_text("model_config_list {")
    for command in (["status", store], ["promote", store, "m"], ["rollback", store, "m"]):
        assert_error(call(capfd, "serving", *command), 3, "models.config: not a ModelServerConfig")
    file.write_text(
        'model_config_list { config { name: "gone" base_path: "/models/gone" '
        'model_platform: "tensorflow" } }'
    )
    result = call(capfd, "serving", "status", store)
    assert result.code == 3 and "gone: policy latest 1" in result.out
    assert result.err.count("\n") == 1 and "names model 'gone'" in result.err
    assert_error(call(capfd, "serving", "promote", store, "gone"), 3, "gone")


@pytest.fixture
def running(warm_keras, tmp_path):
    """A server of a store with versions 1 and 2 that shows 1 and follows its ``models.config``."""
    toy.build_small(tmp_path / "m" / "1")
    toy.build_small(tmp_path / "m" / "2", scale=2.0)
    Store(tmp_path).promote("m", 1)
    options = Options(rest_port=0, grpc_port=0, poll_seconds=0.1, early_labels=True)
    options.store, options.config_poll_seconds = tmp_path, 0.1
    with Server(followed_store(tmp_path), options) as server:
        yield server


def test_with_a_running_server(running, tmp_path, capfd):
    server, file = running, tmp_path / "models.config"
    url = ["--url", f"http://127.0.0.1:{server.rest_port}"]
    result = call(capfd, "serving", "promote", tmp_path, "m", 2, *url)
    assert result.code == 0 and "is on version 2 (was 1)" in result.out, result.err
    with server.manager.use("m", label="stable") as found:
        assert found.number == 2
    result = call(capfd, "serving", "status", tmp_path, *url)
    assert "  2  stable, to be served, server: AVAILABLE" in result.out
    grpc = ["--grpc", f"127.0.0.1:{server.grpc_port}"]
    assert call(capfd, "serving", "rollback", tmp_path, "m", *grpc).code == 0
    with server.manager.use("m", label="stable") as found:
        assert found.number == 1
    shutil.copytree(tmp_path / "m" / "1", tmp_path / "m" / "3")
    (tmp_path / "m" / "3" / "saved_model.pb").write_bytes(b"not a graph")
    before = file.read_bytes()
    result = call(capfd, "serving", "promote", tmp_path, "m", 3, *grpc)
    assert result.code == 1 and "cannot load version 3" in result.err and result.out == ""
    assert "Traceback" not in result.err and file.read_bytes() == before


@pytest.mark.parametrize("command", ["status", "promote", "rollback"])
def test_help_needs_nothing_heavy(command):
    probe = (
        "import sys\nfrom keras_emr_cli.main import main\n"
        f"try: main(['serving', '{command}', '--help'])\n"
        "except SystemExit as stop: code = stop.code\n"
        "heavy = ('tensorflow', 'keras', 'numpy', 'grpc', 'google.protobuf')\n"
        "print(code, [name for name in heavy if name in sys.modules], file=sys.stderr)"
    )
    result = python("-c", probe)
    assert result.err == "0 []\n" and "STORE" in result.out
