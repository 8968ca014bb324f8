"""Version policies, the switch to a new version, and versions that must not be served."""

import shutil
import threading
import time

import pytest
import requests

from keras_emr_serving.server.config import ModelConfig, read_config, store_models
from keras_emr_serving.server.server import Options, Server
from keras_emr_serving.server.status import ServingError
from tests.serving import toy
from tests.serving.managing import states, until

pytest_plugins = ["tests.serving.own_store"]

ONES = '{"instances": [[1, 1, 1]]}'
FIRST, SECOND = [[9.0, 12.0]], [[18.0, 24.0]]


def test_a_new_version_takes_over_without_a_failed_request(made, folder):
    """Requests all along from three threads; the old version goes only after the new one works."""
    options = Options(rest_port=0, grpc_port=None, poll_seconds=0.05)
    with Server(store_models(folder.parent), options) as server:
        url = f"http://127.0.0.1:{server.rest_port}/v1/models/m"
        seen, stop = [], threading.Event()

        def ask():
            session = requests.Session()
            while not stop.is_set():
                answer = session.post(f"{url}:predict", data=ONES, timeout=30)
                seen.append((answer.status_code, answer.json().get("predictions")))

        threads = [threading.Thread(target=ask) for _ in range(3)]
        for thread in threads:
            thread.start()
        until(lambda: len(seen) > 20)
        toy.publish(made / "double", folder / "2")
        until(lambda: states(server.manager) == {2: "AVAILABLE", 1: "END"})
        before = len(seen)
        until(lambda: len(seen) > before + 20)
        shutil.rmtree(folder / "2")  # a rollback
        until(lambda: states(server.manager) == {2: "END", 1: "AVAILABLE"})
        before = len(seen)
        until(lambda: len(seen) > before + 20)
        stop.set()
        for thread in threads:
            thread.join()
        status = requests.get(url, timeout=30).json()["model_version_status"]
    assert {code for code, _ in seen} == {200}
    answers = [answer for _, answer in seen]
    assert answers[0] == FIRST and SECOND in answers and answers[-1] == FIRST
    assert [(row["version"], row["state"]) for row in status] == [("2", "END"), ("1", "AVAILABLE")]


def test_a_version_that_cannot_be_loaded_leaves_the_old_one(made, folder, manage, caplog):
    manager = manage(ModelConfig("m", folder))
    broken = toy.publish(made / "double", folder / "2") or folder / "2"
    (broken / "variables" / "variables.index").write_bytes(b"broken")
    manager.poll()
    assert states(manager) == {1: "AVAILABLE", 2: "END"}
    ((_, _, error),) = manager.status("m", 2)
    assert error.code != "OK" and error.message
    assert "model m version 2: cannot be loaded" in caplog.text
    page = manager._metrics.text().decode()
    path = f'model_path="{broken}"'
    assert f':tensorflow:cc:saved_model:load_attempt_count{{{path},status="fail"}} 1.0' in page
    with manager.use("m") as used:
        assert used.number == 1
    manager.poll()  # nothing changed: no second attempt
    assert manager._metrics.text().decode().count('status="fail"} 1.0') == 1
    shutil.rmtree(broken)
    toy.publish(made / "double", broken)
    manager.poll()
    assert states(manager) == {1: "END", 2: "AVAILABLE"}


@pytest.mark.slow
def test_a_minute_of_swaps_and_rollbacks_without_a_failed_request(made, folder):
    options = Options(rest_port=0, grpc_port=None, poll_seconds=0.05)
    with Server(store_models(folder.parent), options) as server:
        url = f"http://127.0.0.1:{server.rest_port}/v1/models/m:predict"
        seen, stop = [], threading.Event()

        def ask():
            session = requests.Session()
            while not stop.is_set():
                seen.append(session.post(url, data=ONES, timeout=30).status_code)

        threads = [threading.Thread(target=ask) for _ in range(3)]
        for thread in threads:
            thread.start()
        end, swaps = time.monotonic() + 60, 0
        while time.monotonic() < end:
            toy.publish(made / "double", folder / "2")
            until(lambda: states(server.manager) == {2: "AVAILABLE", 1: "END"})
            shutil.rmtree(folder / "2")
            until(lambda: states(server.manager) == {2: "END", 1: "AVAILABLE"})
            swaps += 2
        stop.set()
        for thread in threads:
            thread.join()
    assert swaps > 10 and len(seen) > 1000
    assert set(seen) == {200}


@pytest.mark.parametrize("name", ["2.tmp", "-3", "v2", ".2.part", "2 "])
def test_a_folder_that_is_no_version_is_not_served(made, folder, manage, name):
    shutil.copytree(made / "double", folder / name)
    assert states(manage(ModelConfig("m", folder, "all"))) == {1: "AVAILABLE"}


def test_a_version_that_is_still_being_written_is_not_served(made, folder, manage):
    (folder / "2" / "variables").mkdir(parents=True)
    manager = manage(ModelConfig("m", folder))
    assert states(manager) == {1: "AVAILABLE"}
    shutil.copytree(made / "double", folder / "2", dirs_exist_ok=True)
    manager.poll()
    assert states(manager)[2] == "AVAILABLE"


@pytest.mark.parametrize(
    ("policy", "served"), [(1, {3}), (2, {2, 3}), ("all", {1, 2, 3}), ((1, 3), {1, 3})]
)
def test_policies(made, folder, manage, policy, served):
    for number in (2, 3):
        toy.publish(made / "double", folder / str(number))
    manager = manage(ModelConfig("m", folder, policy))
    assert set(states(manager)) == served
    with manager.use("m") as used:
        assert used.number == 3


def test_a_version_in_use_is_unloaded_only_afterwards(made, folder, manage):
    manager = manage(ModelConfig("m", folder))
    with manager.use("m") as used:
        toy.publish(made / "double", folder / "2")
        polling = threading.Thread(target=manager.poll)
        polling.start()
        until(lambda: states(manager) == {1: "UNLOADING", 2: "AVAILABLE"})
        assert used.servable is not None
    polling.join(timeout=20)
    assert states(manager) == {1: "END", 2: "AVAILABLE"}


def test_a_model_that_leaves_the_configuration(made, folder, manage):
    manager = manage(ModelConfig("m", folder))
    manager.reconfigure([])
    assert states(manager) == {1: "END"}
    with pytest.raises(ServingError, match=r"Servable not found for request: Latest\(m\)"):
        manager.use("m").__enter__()
    manager.reconfigure([ModelConfig("m", folder)])
    assert states(manager) == {1: "AVAILABLE"}


def test_a_base_path_that_goes_away_changes_nothing(folder, manage):
    manager = manage(ModelConfig("m", folder))
    folder.rename(folder.with_name("gone"))
    manager.poll()
    assert states(manager) == {1: "AVAILABLE"}


def _log(request):
    from tensorflow_serving.apis import predict_pb2, prediction_log_pb2

    message = predict_pb2.PredictRequest()
    for name, value in request.items():
        from tensorflow import make_tensor_proto

        message.inputs[name].CopyFrom(make_tensor_proto(value))
    log = prediction_log_pb2.PredictLog(request=message)
    return prediction_log_pb2.PredictionLog(predict_log=log).SerializeToString()


@pytest.mark.parametrize(
    ("records", "state", "text"),
    [
        ([{"x": [[1.0, 2.0, 3.0]]}] * 2, "AVAILABLE", None),
        ([{"x": [[1.0, 2.0, 3.0]]}, {"y": [[1.0]]}], "END", "Signature input alias: x"),
        ([{"x": [[1.0, 2.0]]}], "END", "Matrix size-incompatible"),
        ([{"x": [[1.0, 2.0, 3.0]]}] * 1001, "END", "exceeds the maximum"),
    ],
    ids=["good", "misnamed", "wrong shape", "too many"],
)
def test_warm_up(made, folder, manage, records, state, text):
    import tensorflow as tf

    target = folder / "1" / "assets.extra"
    target.mkdir(exist_ok=True)
    with tf.io.TFRecordWriter(str(target / "tf_serving_warmup_requests")) as writer:
        for record in records:
            writer.write(_log(record))
    manager = manage(ModelConfig("m", folder))
    ((_, found, error),) = manager.status("m")
    assert found == state
    assert error is None if text is None else text in error.message
    assert ":tensorflow:serving:model_warmup_latency_count" in manager._metrics.text().decode()


CONFIG = """
model_config_list {{
  config {{ name: "m" base_path: "{path}" model_platform: "tensorflow"
    model_version_policy {{ specific {{ versions: 1 versions: 2 }} }}
    version_labels {{ key: "stable" value: 1 }} }}
}}
"""

ONE_MORE = 'config { name: "m" base_path: "/b" model_platform: "tensorflow" }'


def test_a_config_text(tmp_path):
    (one,) = read_config(CONFIG.format(path=tmp_path))
    assert one == ModelConfig("m", tmp_path, (1, 2), {"stable": 1})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nonsense", "not a ModelServerConfig"),
        ("custom_model_config {}", "Only ModelConfigList is currently supported"),
        (
            CONFIG.format(path="here"),
            "Expected model m to have an absolute path or URI; got base_path()=here",
        ),
        (
            CONFIG.format(path="/a").replace("} }\n}", "} }\n%s}") % ONE_MORE,
            "Illegal to list model m multiple times in config list",
        ),
        (CONFIG.format(path="/a").replace("tensorflow", "other"), "model_platform is 'other'"),
    ],
)
def test_a_config_text_that_is_refused(text, message):
    with pytest.raises(ServingError) as error:
        read_config(text)
    assert message in error.value.message
