"""Moving labels in ``models.config``, with and without a server that follows."""

import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from itertools import pairwise

import numpy as np
import pytest
import requests
from google.protobuf import text_format
from tensorflow_serving.config.model_server_config_pb2 import ModelServerConfig

from keras_emr.errors import UserError
from keras_emr_serving import Client, following
from keras_emr_serving.lifecycle import Store, previous_of
from keras_emr_serving.models_config import ConfigFile
from keras_emr_serving.running import GrpcServer, RestServer, ServerTrouble
from keras_emr_serving.server.config import read_config
from keras_emr_serving.server.server import Options, Server
from keras_emr_serving.server.status import ServingError
from tests.serving import toy

ONE = np.array([[1.0, 2.0, 3.0]], "float32")
BODY = {"instances": [[1.0, 2.0, 3.0]]}
SCORES = {1: [[22.0, 28.0]], 2: [[44.0, 56.0]]}


@pytest.fixture
def folder(tmp_path):
    """A store with versions 1, 2, 10 of ``m``, and a half-written 11; nothing loads them."""
    for number in (1, 2, 10, 11):
        (tmp_path / "m" / str(number)).mkdir(parents=True)
        if number != 11:
            (tmp_path / "m" / str(number) / "saved_model.pb").write_bytes(b"whole")
    return tmp_path


def written(folder):
    """What the server would make of the file: both its parser and the protos."""
    text = (folder / "models.config").read_text()
    proto = text_format.Parse(text, ModelServerConfig())
    (model,) = [one for one in read_config(text) if one.name == "m"]
    (entry,) = [one for one in proto.model_config_list.config if one.name == "m"]
    assert list(model.versions) == list(entry.model_version_policy.specific.versions)
    assert model.labels == dict(entry.version_labels)
    return model


def test_promote_again_and_back(folder):
    store = Store(folder)
    change = store.promote("m", 1)
    assert (change.version, change.was, change.previous) == (1, None, None)
    model = written(folder)
    assert (model.versions, model.labels) == ((1,), {"stable": 1})
    assert str(model.base_path) == str(folder.resolve() / "m")

    change = store.promote("m", pause=0)  # the newest whole one
    assert (change.version, change.was, change.previous) == (10, 1, 1)
    assert written(folder).labels == {"stable": 10, "previous": 1}
    assert written(folder).versions == (1, 10)

    store.promote("m", 2, pause=0)
    assert written(folder).labels == {"stable": 2, "previous": 10}
    assert written(folder).versions == (2, 10)

    before = (folder / "models.config").read_text()
    change = store.rollback("m")
    assert (change.version, change.was, change.previous) == (10, 2, 2)
    assert written(folder).labels == {"stable": 10, "previous": 2}
    assert written(folder).versions == (2, 10)  # nothing has to be loaded
    store.rollback("m")
    assert (folder / "models.config").read_text() == before


def test_promoting_what_is_promoted_keeps_the_way_back(folder):
    store = Store(folder)
    store.promote("m", 1)
    store.promote("m", 2, pause=0)
    text = (folder / "models.config").read_text()
    store.promote("m", 2)
    assert (folder / "models.config").read_text() == text


def test_another_label_has_its_own_way_back(folder):
    store = Store(folder)
    store.promote("m", 1)
    store.promote("m", 2, label="canary")
    store.promote("m", 10, label="canary", pause=0)
    expected = {"stable": 1, "canary": 10, previous_of("canary"): 2}
    assert written(folder).labels == expected
    assert written(folder).versions == (1, 2, 10)
    with pytest.raises(UserError, match="nothing to roll back to"):
        store.rollback("m")
    assert store.rollback("m", label="canary").version == 2


def test_a_version_is_loaded_before_the_label_moves(folder, monkeypatch):
    """TensorFlow Serving refuses a label on a version that the file before did not load."""
    store = Store(folder)
    store.promote("m", 1)
    texts = []
    write = ConfigFile.write
    monkeypatch.setattr(
        ConfigFile, "write", lambda self, text, over: (texts.append(text), write(self, text, over))
    )
    slept = []
    monkeypatch.setattr(time, "sleep", slept.append)
    store.promote("m", 2, pause=7)
    assert slept == [7]
    steps = [read_config(text)[0] for text in texts]
    assert [(one.versions, one.labels) for one in steps] == [
        ((1, 2), {"stable": 1}),
        ((1, 2), {"stable": 2, "previous": 1}),
    ]
    texts.clear()
    store.rollback("m")
    assert len(texts) == 1 and slept == [7]


def test_what_the_policy_already_loads_needs_one_step(folder, monkeypatch):
    (folder / "models.config").write_text(
        f'model_config_list {{ config {{ name: "m" base_path: "{folder}/m" '
        'model_platform: "tensorflow" model_version_policy { all {} } '
        'version_labels { key: "stable" value: 1 } } }'
    )
    slept = []
    monkeypatch.setattr(time, "sleep", slept.append)
    # A server may not have seen yet what was written 4 s ago.
    os.utime(folder / "models.config", (time.time() - 4,) * 2)
    Store(folder).promote("m", 2)
    assert slept == [pytest.approx(6, abs=1)]
    assert written(folder).labels == {"stable": 2, "previous": 1}
    Store(folder).promote("m", 1)  # it has a label: it has been loaded
    os.utime(folder / "models.config", (time.time() - 60,) * 2)
    Store(folder).promote("m", 2)
    assert len(slept) == 1


ODD = """# Ours. Do not touch: { "
model_config_list: {
  config <
    name: 'other'  # the old one }
    base_path: "/models/oth" "er"
    model_platform: "tensorflow"
    a_field_of_tomorrow { x: [1, 2] y: "}" }
    model_version_policy { latest { num_versions: 2 } }
    version_labels { key: "a" value: 1 }
  >;
  config {
    # about m
    name: "m", base_path: "/models/m";
    version_labels: { key: "stable" value: 1 }
    model_version_policy { specific { versions: [1, 2] } }  # both
    model_platform: "tensorflow"
    another_of_tomorrow: -3
    version_labels { key: "mine" value: 2 }; logging_config {
      sampling_config { sampling_rate: 0.5 } }
  }
  future_list_field: "x"
}
"""


def test_everything_else_in_the_file_stays(folder):
    (folder / "models.config").write_text(ODD)
    Store(folder).promote("m", 2)
    text = (folder / "models.config").read_text()
    start, end = ODD.index("  config {\n    # about m"), ODD.index("  }\n  future_list_field")
    assert text.startswith(ODD[:start]) and text.endswith(ODD[end:])
    for kept in ("# about m", "# both", "another_of_tomorrow: -3", "sampling_rate: 0.5"):
        assert text.count(kept) == 1
    other, m = read_config_leniently(text)
    assert m.labels == {"stable": 2, "previous": 1, "mine": 2} and m.versions == (1, 2)
    assert other.labels == {"a": 1} and other.versions == 2


COMMENTED = """model_config_list {
  config {
    name: "m" base_path: "/models/m" model_platform: "tensorflow"
    # of the audit
    model_version_policy {
      # 1 must stay
      specific { versions: 1 }  # says Kim
    }
    version_labels { key: "stable" value: 1 }
  }
}
"""


def test_comments_inside_what_is_replaced_stay(folder):
    (folder / "models.config").write_text(COMMENTED)
    Store(folder).promote("m", 2, pause=0)
    Store(folder).rollback("m")
    text = (folder / "models.config").read_text()
    for comment in ("# of the audit", "# 1 must stay", "# says Kim"):
        assert text.count(f"    {comment}\n") == 1
    assert written(folder).labels == {"stable": 1, "previous": 2}


def test_what_a_newer_server_knows_is_not_lost_with_the_policy(folder):
    text = COMMENTED.replace("specific {", "keep_at_least: 3 specific {")
    (folder / "models.config").write_text(text)
    with pytest.raises(UserError, match="without losing something"):
        Store(folder).promote("m", 2, pause=0)
    assert (folder / "models.config").read_text() == text


def test_line_ends_and_links_stay(folder, tmp_path_factory):
    real = tmp_path_factory.mktemp("elsewhere") / "shared.config"
    real.write_bytes(ODD.replace("\n", "\r\n").encode())
    (folder / "models.config").symlink_to(real)
    Store(folder).promote("m", 2, pause=0)
    assert (folder / "models.config").is_symlink() and not real.is_symlink()
    made = real.read_bytes()
    assert made.count(b"\n") == made.count(b"\r\n") > 20
    real.write_bytes(ODD.encode())
    Store(folder).promote("m", 2, pause=0)
    assert made.replace(b"\r\n", b"\n") == real.read_bytes()


def read_config_leniently(text):
    from keras_emr_serving.server.config import from_proto

    return from_proto(text_format.Parse(text, ModelServerConfig(), allow_unknown_field=True))


def test_a_new_model_goes_beside_the_others(folder):
    shutil.copytree(folder / "m", folder / "n")
    (folder / "models.config").write_text("# empty\n")
    store = Store(folder)
    store.promote("m", 1, base_path="/models/")
    store.promote("n", 2)  # where the server sees the others
    text = (folder / "models.config").read_text()
    assert text.startswith("# empty\n")
    assert [(one.name, str(one.base_path), one.labels) for one in read_config(text)] == [
        ("m", "/models/m", {"stable": 1}),
        ("n", "/models/n", {"stable": 2}),
    ]


def test_a_file_that_cannot_be_kept_whole_is_left_alone(folder):
    text = f'model_config_list {{ config: [{{ name: "m" base_path: "{folder}/m" '
    text += 'model_platform: "tensorflow" }] }'
    (folder / "models.config").write_text(text)
    with pytest.raises(UserError, match="too unusual"):
        Store(folder).promote("m", 1)
    assert (folder / "models.config").read_text() == text


def test_a_version_that_was_deleted_is_not_remembered(folder):
    store, told = Store(folder), []
    store.promote("m", 1)
    store.promote("m", 2, pause=0)
    shutil.rmtree(folder / "m" / "1")
    with pytest.raises(UserError, match="no such version"):
        store.rollback("m")
    assert store.status("m")[0].problems == ["label 'previous' of 'm' is on version 1: missing"]
    shutil.rmtree(folder / "m" / "2")
    store.promote("m", 10, pause=0, tell=told.append)
    assert written(folder).labels == {"stable": 10} and written(folder).versions == (10,)
    assert any("version 2" in line for line in told)


BAD = {
    "missing model": (lambda s: s.promote("mm", 1), "unknown model. Received: 'mm'"),
    "missing version": (lambda s: s.promote("m", 3), "no such version. Received: 3. Expected one"),
    "half-written": (lambda s: s.promote("m", 11), "version 11 is half-written"),
    "nothing before": (lambda s: s.rollback("m"), "nothing to roll back to"),
    "label": (lambda s: s.promote("m", 1, label="a b"), "not a label. Received: 'a b'"),
    "kept label": (lambda s: s.promote("m", 1, label="previous"), "kept for the version before"),
    "base path": (lambda s: s.promote("m", 1, base_path="models"), "not absolute"),
    "model": (lambda s: s.status("x"), "unknown model. Received: 'x'"),
}


@pytest.mark.parametrize(("call", "message"), BAD.values(), ids=BAD)
def test_bad_input_changes_nothing(folder, call, message):
    with pytest.raises(UserError) as error:
        call(Store(folder))
    assert message in str(error.value) and "\n" not in str(error.value)
    assert not (folder / "models.config").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"model_config_list { config {", "not a ModelServerConfig"),
        (b"\xff\xfe\x00", "not a text file"),
        (b'modle_config_list { config { name: "m" } }', "Only ModelConfigList"),
        (b'model_config_list { config { base_path: "/m" } }', "a name"),
        (b'model_config_list { config { name: "m" base_path: "m" } }', "absolute path"),
    ],
)
def test_an_unreadable_config_is_named(folder, content, message):
    (folder / "models.config").write_bytes(content)
    for call in (lambda s: s.status(), lambda s: s.promote("m", 1), lambda s: s.rollback("m")):
        with pytest.raises(UserError, match=message) as error:
            call(Store(folder))
        assert "models.config" in str(error.value)
    assert (folder / "models.config").read_bytes() == content


def test_a_config_that_names_a_missing_model(folder):
    (folder / "models.config").write_text(
        'model_config_list { config { name: "gone" base_path: "/models/gone" '
        'model_platform: "tensorflow" } }'
    )
    store = Store(folder)
    assert [one.name for one in store.status()] == ["gone", "m"]
    assert store.status("gone")[0].problems == [
        "models.config names model 'gone', which is not in the store"
    ]
    with pytest.raises(UserError, match="cannot look into the model's folder"):
        store.promote("gone")
    store.promote("m", 1)  # another model's trouble does not stop this one
    assert written(folder).labels == {"stable": 1}


def test_others_may_read_the_file(folder):
    """The server runs as another user; a temporary file would be for its owner only."""
    store = Store(folder)
    store.promote("m", 1)
    path = folder / "models.config"
    assert path.stat().st_mode & 0o777 == 0o644
    path.chmod(0o664)
    store.promote("m", 2, pause=0)
    assert path.stat().st_mode & 0o777 == 0o664


def _promote(folder, version, start):
    start.wait()
    Store(folder).promote("m", version, pause=0)


def test_concurrent_promotions_come_one_after_the_other(folder):
    """Whichever comes last, the one before it must be the way back."""
    context = multiprocessing.get_context("fork")
    Store(folder).promote("m", 1)
    start = context.Event()
    workers = [context.Process(target=_promote, args=(folder, n, start)) for n in (2, 10)]
    for one in workers:
        one.start()
    start.set()
    for one in workers:
        one.join(60)
        assert one.exitcode == 0
    labels = written(folder).labels
    assert {labels["stable"], labels["previous"]} == {2, 10}
    assert [path.name for path in folder.glob(".models.config.*")] == [".models.config.lock"]


def test_a_writer_at_work_is_waited_for_and_then_named(folder):
    config = ConfigFile(folder)
    with config.locked(), pytest.raises(UserError, match="another keras-emr serving command"):
        with ConfigFile(folder).locked(seconds=0.1):
            pass
    with ConfigFile(folder).locked(seconds=0.1):
        pass


KILLED = """
import os, signal, sys
from keras_emr_serving import Client, following
from keras_emr_serving.lifecycle import Store
real = os.fsync
def die(descriptor):
    real(descriptor)
    os.kill(os.getpid(), signal.SIGKILL)
os.fsync = die
Store(sys.argv[1]).promote("m", 2, pause=0)
"""


def test_a_killed_writer_leaves_the_old_file_whole(folder):
    Store(folder).promote("m", 1)
    before = (folder / "models.config").read_bytes()
    done = subprocess.run([sys.executable, "-c", KILLED, str(folder)], timeout=120)
    assert done.returncode == -signal.SIGKILL
    assert (folder / "models.config").read_bytes() == before
    Store(folder).promote("m", 2, pause=0)  # its lock went with it
    assert written(folder).labels == {"stable": 2, "previous": 1}


IN_BETWEEN = """
import os, signal, sys, time
from keras_emr_serving import Client, following
from keras_emr_serving.lifecycle import Store
time.sleep = lambda seconds: os.kill(os.getpid(), getattr(signal, sys.argv[2]))
Store(sys.argv[1]).promote("m", 2)
"""


def test_killed_between_the_two_writes(folder, monkeypatch):
    """The version is to be loaded, its label has not moved: the next call goes on from there."""
    Store(folder).promote("m", 1)
    command = [sys.executable, "-c", IN_BETWEEN, str(folder), "SIGKILL"]
    assert subprocess.run(command, timeout=120).returncode == -signal.SIGKILL
    assert (written(folder).versions, written(folder).labels) == ((1, 2), {"stable": 1})
    slept = []
    monkeypatch.setattr(time, "sleep", slept.append)
    Store(folder).promote("m", 2, pause=60)
    (seconds,) = slept  # what is left of it
    assert 0 < seconds < 60
    assert written(folder).labels == {"stable": 2, "previous": 1}


def test_ctrl_c_between_the_two_writes_changes_nothing(folder, monkeypatch):
    Store(folder).promote("m", 1)
    before = (folder / "models.config").read_text()

    def interrupt(seconds):
        assert written(folder).versions == (1, 2)
        raise KeyboardInterrupt

    monkeypatch.setattr(time, "sleep", interrupt)
    with pytest.raises(KeyboardInterrupt):
        Store(folder).promote("m", 2)
    assert (folder / "models.config").read_text() == before


def test_what_somebody_else_writes_in_between_stays(folder, monkeypatch):
    """An editor knows nothing of our lock."""
    Store(folder).promote("m", 1)
    path = folder / "models.config"
    edited = []

    def edit(seconds):
        edited.append("# by hand\n" + path.read_text())
        path.write_text(edited[0])

    monkeypatch.setattr(time, "sleep", edit)
    with pytest.raises(UserError, match="somebody else has changed it"):
        Store(folder).promote("m", 2)
    assert path.read_text() == edited[0]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_store_that_cannot_be_written_to(folder):
    folder.chmod(0o555)
    try:
        with pytest.raises(UserError, match="cannot be written to"):
            Store(folder).promote("m", 1)
    finally:
        folder.chmod(0o755)


# With a server --------------------------------------------------------------------------------


@pytest.fixture
def served(made, tmp_path):
    """A store with versions 1 (plain) and 2 (doubled) of ``m`` and a server that shows only 1."""
    (tmp_path / "m").mkdir()
    toy.publish(made / "small", tmp_path / "m" / "1")
    toy.publish(made / "double", tmp_path / "m" / "2")
    Store(tmp_path).promote("m", 1)
    file = tmp_path / "models.config"
    options = Options(
        rest_port=0, grpc_port=0, poll_seconds=0.1, config_file=file, config_poll_seconds=0.1,
        early_labels=True,
    )  # fmt: skip
    with Server(read_config(file.read_text()), options) as server:
        yield tmp_path, server


def ask(server, target=""):
    url = f"http://127.0.0.1:{server.rest_port}/v1/models/m{target}:predict"
    answer = requests.post(url, json=BODY, timeout=30)
    return answer.json().get("predictions") if answer.status_code == 200 else answer.text


def rest(server):
    return RestServer(f"http://127.0.0.1:{server.rest_port}/v1/models/m")


@contextmanager
def steady_load(server):
    """Asks for the label without a pause, over REST and gRPC, and never twice.

    Yields:
        ``(failed, answered)``: what went wrong; API -> the scores, in the order they came.
    """
    failed, answered, stop = [], {"http": [], "grpc": []}, threading.Event()
    ports = {"http": server.rest_port, "grpc": server.grpc_port}

    def ask_again_and_again(scheme):
        url = f"{scheme}://127.0.0.1:{ports[scheme]}/v1/models/m/labels/stable"
        try:
            with Client(url, retries=0) as client:
                while not stop.is_set():
                    (scores,) = client.run("serving_default", {"x": ONE}).values()
                    answered[scheme].append(scores.tolist())
        except Exception as error:
            failed.append(error)

    threads = [threading.Thread(target=ask_again_and_again, args=(one,)) for one in ports]
    for thread in threads:
        thread.start()
    try:
        yield failed, answered
    finally:
        stop.set()
        for thread in threads:
            thread.join(30)


def wait_for(condition):
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize(
    ("api", "seconds"),
    [
        ("rest", 0.0),
        ("grpc", 0.0),
        pytest.param("rest", 60.0, marks=[pytest.mark.slow, pytest.mark.long]),
    ],
)
def test_no_request_fails_over_promotions_and_rollbacks(served, api, seconds):
    """Version 2 is loaded, gets the label, loses it, and is unloaded for the next round."""
    folder, server = served
    other = rest(server) if api == "rest" else GrpcServer(f"127.0.0.1:{server.grpc_port}")
    store, rounds, begin = Store(folder), 0, time.monotonic()
    first = (folder / "models.config").read_text()
    with steady_load(server) as (failed, answered):
        while rounds == 0 or time.monotonic() < begin + seconds:
            for number, change in ((2, store.promote), (1, store.rollback)):
                enough = {scheme: len(scores) + 3 for scheme, scores in answered.items()}
                assert change("m", server=other, timeout=60).confirmed
                assert ask(server, "/labels/stable") == SCORES[number]
                assert ask(server, "/labels/previous") == SCORES[3 - number]
                for scheme in answered:
                    wait_for(lambda s=scheme, n=enough: failed or len(answered[s]) >= n[s])
            assert {n: one.state for n, one in other.states("m").items()} == {
                1: "AVAILABLE",
                2: "AVAILABLE",
            }
            rounds += 1
            ConfigFile(folder).write(first)
            other.reload(first)
            wait_for(lambda: server.manager.serving() == [("m", 1)])
    assert failed == []
    for scores in answered.values():
        switches = sum(one != after for one, after in pairwise(scores))
        assert all(one in SCORES.values() for one in scores)
        assert switches == 2 * rounds
    assert other.labelled("m", "nosuch") is None
    assert other.states("nosuch") == {}


@pytest.mark.parametrize("api", ["rest", "grpc"])
def test_a_server_that_looks_at_labels_first(served, api, monkeypatch):
    """TensorFlow Serving's order: labels are checked, with what is loaded then, before any load."""
    folder, server = served
    manager, refused = server.manager, []
    reconfigure, labels = manager.reconfigure, {"stable"}

    def strict(models):
        models = list(models)
        loaded = manager.serving()
        for one in models:
            for label, number in one.labels.items():
                if (one.name, number) not in loaded and label in labels:
                    refused.append((label, number))
                    raise ServingError("FAILED_PRECONDITION", "not currently available")
        reconfigure(models)

    monkeypatch.setattr(manager, "reconfigure", strict)
    file = folder / "models.config"
    first = file.read_text()
    at_once = ConfigFile(folder).changed(first, "m", [1, 2], {"stable": 2, "previous": 1}, "")
    other = rest(server) if api == "rest" else GrpcServer(f"127.0.0.1:{server.grpc_port}")
    if api == "grpc":
        with pytest.raises(ServerTrouble, match="not currently available"):
            other.reload(at_once)
        assert refused == [("stable", 2)]
        refused.clear()
    Store(folder).promote("m", 2, server=other, timeout=60)
    assert refused == [] and ask(server, "/labels/stable") == SCORES[2]
    Store(folder).rollback("m", server=other, timeout=60)
    assert refused == [] and ask(server, "/labels/stable") == SCORES[1]


@pytest.mark.parametrize("api", ["rest", "grpc"])
def test_a_version_that_does_not_load_changes_nothing(served, made, api):
    folder, server = served
    other = rest(server) if api == "rest" else GrpcServer(f"127.0.0.1:{server.grpc_port}")
    broken = folder / "m" / "3"
    shutil.copytree(made / "small", broken)
    (broken / "saved_model.pb").write_bytes(b"not a graph")
    before = (folder / "models.config").read_text()
    with pytest.raises(ServerTrouble, match="cannot load version 3"):
        Store(folder).promote("m", 3, server=other, timeout=60)
    assert (folder / "models.config").read_text() == before
    assert ask(server, "/labels/stable") == SCORES[1]
    Store(folder).promote("m", 2, server=other, timeout=60)
    assert ask(server, "/labels/stable") == SCORES[2]


def test_a_version_that_is_mended_is_not_judged_by_its_past(served, made, monkeypatch):
    """The server still tells of the failure when it is asked again, until it has looked again."""
    folder, server = served
    broken, other = folder / "m" / "3", rest(server)
    shutil.copytree(made / "small", broken)
    whole = (broken / "saved_model.pb").read_bytes()
    (broken / "saved_model.pb").write_bytes(b"not a graph")
    with pytest.raises(ServerTrouble, match="cannot load version 3"):
        Store(folder).promote("m", 3, server=other, timeout=60)
    assert other.states("m")[3].error
    monkeypatch.setattr(following, "GRACE", 0.5)
    with pytest.raises(ServerTrouble, match="cannot load version 3"):  # as bad as before
        Store(folder).promote("m", 3, server=other, timeout=60)
    (broken / "saved_model.pb").write_bytes(whole)
    monkeypatch.setattr(following, "GRACE", 30)
    assert Store(folder).promote("m", 3, server=other, timeout=60).version == 3
    assert ask(server, "/labels/stable") == SCORES[1]  # of the same weights


def test_an_answer_that_is_missed_while_waiting(served):
    """A server may be too busy to tell, now and then, while it loads."""
    folder, server = served
    other, states, asked = rest(server), RestServer.states, []

    def now_and_then(name):
        asked.append(name)
        if len(asked) % 2 == 0:
            raise ServerTrouble("no answer: busy")
        return states(other, name)

    other.states = now_and_then
    Store(folder).promote("m", 2, server=other, timeout=60)
    assert len(asked) > 2 and ask(server, "/labels/stable") == SCORES[2]
    with pytest.raises(ServerTrouble, match=r"has not moved .* in 0 s.* no answer from"):
        following.wait_for_label(RestServer("http://127.0.0.1:9"), "m", "stable", 2, 0)


def test_a_reload_that_is_refused_changes_nothing(served):
    """The second of the two steps: the version is loaded by then."""
    folder, server = served
    other, before = (
        GrpcServer(f"127.0.0.1:{server.grpc_port}"),
        (folder / "models.config").read_text(),
    )
    reload, texts = other.reload, []

    def refuse(text):
        texts.append(text)
        if len(texts) == 2:
            raise ServerTrouble("refused")
        reload(text)

    other.reload = refuse
    with pytest.raises(ServerTrouble, match="refused"):
        Store(folder).promote("m", 2, server=other, timeout=60)
    assert texts[2] == before == (folder / "models.config").read_text()
    assert ask(server, "/labels/stable") == SCORES[1]


def test_a_server_that_never_looks_is_said_so(served):
    folder, server = served
    server.options.config_file = folder / "another.config"
    before = (folder / "models.config").read_text()
    with pytest.raises(ServerTrouble, match="has not loaded version 2"):
        Store(folder).promote("m", 2, server=rest(server), timeout=0.5)
    assert (folder / "models.config").read_text() == before


def test_a_server_that_is_not_there(folder):
    Store(folder).promote("m", 1)
    before = (folder / "models.config").read_text()
    for other in (RestServer("http://127.0.0.1:9"), GrpcServer("127.0.0.1:9")):
        with pytest.raises(ServerTrouble, match=r"127\.0\.0\.1:9"):
            Store(folder).promote("m", 2, server=other)
        assert (folder / "models.config").read_text() == before


@pytest.mark.parametrize(
    "url",
    ["localhost:8501", "ftp://x", "http://", "", "http://h:99999", "http://h:x", "http://h/ x"],
)
def test_addresses_that_are_none(url):
    with pytest.raises(UserError, match="--url: not an address"):
        RestServer(url)
    with pytest.raises(UserError, match="--grpc: not an address"):
        GrpcServer(url.replace("8501", "port"))


def test_a_port_of_something_else(server):
    with pytest.raises(ServerTrouble, match="REST API does"):
        RestServer(f"http://127.0.0.1:{server.grpc_port}").states("m")
