"""Labels, new configurations, and versions that cannot be loaded at once."""

import shutil
import threading

import pytest

from keras_emr_serving.server.config import ModelConfig, followed_store
from keras_emr_serving.server.server import Options, Server
from keras_emr_serving.server.status import ServingError
from tests.serving import toy
from tests.serving.managing import breaks, states, until

pytest_plugins = ["tests.serving.own_store"]

UNAVAILABLE = "Request to assign label to version {} of model m, which is not currently available"


def number_of(manager, label):
    with manager.use("m", label=label) as used:
        return used.number


def refused(text, call, *arguments):
    with pytest.raises(ServingError) as error:
        call(*arguments)
    assert text in error.value.message
    return error.value.code


def test_a_store_and_what_its_models_config_says(made, tmp_path):
    """Of a container's path the last part counts, if the folder is only here."""
    for name in ("m", "other", "away"):
        toy.publish(made / "small", tmp_path / name / "1")
    (tmp_path / "models.config").write_text(
        """model_config_list {
          config { name: "m" base_path: "/models/m" model_platform: "tensorflow"
                   model_version_policy { specific { versions: 1 } }
                   version_labels { key: "stable" value: 1 } }
          config { name: "x" base_path: "%s" model_platform: "tensorflow" }
        }"""
        % (tmp_path / "away")
    )
    assert sorted(followed_store(tmp_path), key=lambda one: one.name) == [
        ModelConfig("away", tmp_path / "away"),
        ModelConfig("m", tmp_path / "m", (1,), {"stable": 1}),
        ModelConfig("other", tmp_path / "other"),
        ModelConfig("x", tmp_path / "away"),
    ]
    (tmp_path / "models.config").unlink()
    assert {one.name for one in followed_store(tmp_path)} == {"m", "other", "away"}


def test_what_is_followed_is_taken_over_once(made, tmp_path, manage):
    for name in ("b", "c"):
        toy.publish(made / "small", tmp_path / name / "1")
    manager = manage(*followed_store(tmp_path))
    assert not manager.follow(lambda: followed_store(tmp_path))
    toy.publish(made / "double", tmp_path / "a" / "1")  # a new model, before the others
    assert manager.follow(lambda: followed_store(tmp_path))
    assert [name for name, _ in manager.serving()] == ["a", "b", "c"]
    assert not manager.follow(lambda: followed_store(tmp_path))


def test_labels_move_between_versions_that_are_loaded(made, folder, manage):
    toy.publish(made / "double", folder / "2")
    manager = manage(ModelConfig("m", folder, "all"))
    manager.reconfigure([ModelConfig("m", folder, "all", {"stable": 1, "canary": 2})])
    assert (number_of(manager, "stable"), number_of(manager, "canary")) == (1, 2)
    manager.reconfigure([ModelConfig("m", folder, "all", {"stable": 2})])
    assert number_of(manager, "stable") == 2
    refused("Unrecognized servable version label: canary", number_of, manager, "canary")


def test_at_the_start_every_label_is_refused_unless_that_is_allowed(folder, manage):
    config = ModelConfig("m", folder, 1, {"stable": 1})
    assert refused(UNAVAILABLE.format(1), manage, config) == "FAILED_PRECONDITION"
    assert number_of(manage(config, early_labels=True), "stable") == 1


def test_a_refused_label_leaves_the_whole_configuration_as_it_was(made, folder, manage):
    """Labels are checked before anything is loaded or unloaded, as TensorFlow Serving does."""
    toy.publish(made / "double", folder / "2")
    (folder.parent / "other").mkdir()
    toy.publish(made / "small", folder.parent / "other" / "1")
    before = ModelConfig("m", folder, (1,))
    manager = manage(before)
    manager.reconfigure([ModelConfig("m", folder, (1,), {"stable": 1})])
    in_force = manager.configs
    wanted = [
        ModelConfig("other", folder.parent / "other"),
        ModelConfig("m", folder, (2,), {"stable": 2}),
    ]
    assert refused(UNAVAILABLE.format(2), manager.reconfigure, wanted) == "FAILED_PRECONDITION"
    assert manager.configs == in_force and states(manager) == {1: "AVAILABLE"}
    assert number_of(manager, "stable") == 1 and not manager.knows("other")
    manager.poll()
    assert states(manager) == {1: "AVAILABLE"}


def test_an_early_label_may_be_new_but_not_move(made, folder, manage):
    manager = manage(ModelConfig("m", folder, 1, {"stable": 1}), early_labels=True)
    wanted = [ModelConfig("m", folder, "all", {"stable": 2})]
    refused(UNAVAILABLE.format(2), manager.reconfigure, wanted)
    manager.reconfigure([ModelConfig("m", folder, "all", {"stable": 1, "next": 2})])
    refused("Servable not found for request: Specific(m, 2)", number_of, manager, "next")
    toy.publish(made / "double", folder / "2")
    manager.poll()
    assert number_of(manager, "next") == 2
    breaks(folder / "2")  # a label stays where it is while its version is away
    manager.reconfigure([ModelConfig("m", folder, (1,), {"next": 2, "stable": 1})])
    assert states(manager) == {1: "AVAILABLE", 2: "END"}
    manager.reconfigure([ModelConfig("m", folder, (1,), {"next": 2})])


def test_a_new_model_that_cannot_be_loaded_is_an_error_of_the_reload(folder, manage):
    breaks(folder / "1")
    manager = manage()
    code = refused(
        "1 servable(s) did not become available: {{{name: m} due to error: version 1: ",
        manager.reconfigure,
        [ModelConfig("m", folder)],
    )
    assert code == "UNKNOWN"


def test_a_version_that_a_policy_names_and_is_not_there_is_logged_once(folder, manage, caplog):
    manager = manage(ModelConfig("m", folder, (1, 7)))
    manager.poll()
    assert states(manager) == {1: "AVAILABLE"}
    assert caplog.text.count("no such version in") == 1 and f"{folder}: 7" in caplog.text


def attempts(manager, path, status="fail"):
    name = f':tensorflow:cc:saved_model:load_attempt_count{{model_path="{path}",status="{status}"}}'
    lines = [one for one in manager._metrics.text().decode().splitlines() if name in one]
    return float(lines[0].split()[-1]) if lines else 0


def test_a_version_that_cannot_be_loaded_is_tried_again_so_often(made, folder, manage, caplog):
    manager = manage(ModelConfig("m", folder), retries=2, retry_seconds=0.0)
    toy.publish(made / "double", folder / "2")
    breaks(folder / "2")
    for _ in range(5):
        manager.poll()
        assert states(manager) == {1: "AVAILABLE", 2: "END"}
        with manager.use("m") as used:
            assert used.number == 1
    assert attempts(manager, folder / "2") == 3
    assert caplog.text.count("cannot be loaded, tried again in 0 s") == 2
    assert caplog.text.count("cannot be loaded, given up") == 1
    shutil.copytree(made / "double", folder / "2", dirs_exist_ok=True)  # another chance
    manager.poll()
    assert states(manager) == {1: "END", 2: "AVAILABLE"}


def test_the_next_attempt_waits_for_its_time_unless_the_files_change(made, folder, manage):
    breaks(folder / "1")
    manager = manage(ModelConfig("m", folder), retries=2, retry_seconds=3600)
    manager.poll()
    manager.retry()
    assert attempts(manager, folder / "1") == 1
    (folder / "1" / "note").write_text("changed")
    manager.poll()
    assert attempts(manager, folder / "1") == 2


def test_a_trouble_that_passes_without_a_change_of_the_files(folder, manage, monkeypatch):
    """Such as memory that was short: no file changes, but the next attempt works."""
    from keras_emr_serving.server import manager as module

    right, calls = module.load, []

    def load(*arguments):
        calls.append(arguments)
        if len(calls) == 1:
            raise ServingError("RESOURCE_EXHAUSTED", "no memory")
        return right(*arguments)

    monkeypatch.setattr(module, "load", load)
    manager = manage(ModelConfig("m", folder), retry_seconds=0.0)
    ((_, state, error),) = manager.status("m")
    assert (state, error.code) == ("END", "RESOURCE_EXHAUSTED")
    assert manager.unavailable() == {"m": "version 1: RESOURCE_EXHAUSTED: no memory"}
    manager.retry()
    assert states(manager) == {1: "AVAILABLE"} and manager.unavailable() == {}


def test_a_model_in_use_does_not_hold_up_the_others(made, folder, manage, monkeypatch):
    from keras_emr_serving.server import manager as module

    monkeypatch.setattr(module, "_UNLOAD_SECONDS", 0.05)
    manager = manage(ModelConfig("m", folder))
    with manager.use("m") as used:
        toy.publish(made / "double", folder / "2")
        manager.poll()
        toy.publish(made / "small", folder / "3")
        manager.poll()
        assert states(manager) == {1: "UNLOADING", 2: "END", 3: "AVAILABLE"}
        assert used.servable is not None
    until(lambda: states(manager)[1] == "END")
    assert used.servable is None and used.model is None  # its memory is free


CONFIG = """model_config_list {{ config {{ name: "m" base_path: "{}" model_platform: "tensorflow"
    model_version_policy {{ all {{}} }} {} }} }}"""
LABEL = 'version_labels {{ key: "stable" value: {} }}'


@pytest.fixture
def watched(folder, tmp_path):
    """A server without ports that follows the file ``models.config``; and that file."""
    file = tmp_path / "models.config"
    file.write_text(CONFIG.format(folder, ""))
    options = Options(rest_port=None, grpc_port=None, poll_seconds=0.02)
    options.config_file, options.config_poll_seconds = file, 0.02
    with Server([ModelConfig("m", folder, "all")], options) as server:
        yield server, file


def test_a_config_file_that_was_refused_is_tried_until_it_can_be_had(made, folder, watched, caplog):
    server, file = watched
    file.write_text(CONFIG.format(folder, LABEL.format(2)))
    text = UNAVAILABLE.format(2)
    until(lambda: text in caplog.text)
    toy.publish(made / "double", folder / "2")  # not the file: what it needs
    until(lambda: server.manager.configs[0].labels == {"stable": 2})
    assert number_of(server.manager, "stable") == 2
    assert caplog.text.count(text) == 1  # not once for every look


def test_a_config_file_that_cannot_be_read_changes_nothing(folder, watched, caplog):
    server, file = watched
    before = server.manager.configs
    file.write_text("nonsense {")
    until(lambda: "not a ModelServerConfig" in caplog.text)
    file.write_bytes(b"\xff")
    until(lambda: "cannot be read: not a text file" in caplog.text)
    file.unlink()
    until(lambda: "cannot be read: No such file" in caplog.text)
    assert server.manager.configs == before and states(server.manager) == {1: "AVAILABLE"}
    file.write_text(CONFIG.format(folder, LABEL.format(1)))
    until(lambda: server.manager.configs[0].labels == {"stable": 1})


def test_the_config_file_wins_over_what_came_by_another_way(folder, watched):
    server, _ = watched
    server.manager.reconfigure([])
    until(lambda: server.manager.configs and states(server.manager) == {1: "AVAILABLE"})


def test_requests_all_along_while_versions_come_and_go(made, folder, manage):
    """Whoever holds a version can run it, however quickly it is replaced."""
    manager = manage(ModelConfig("m", folder))
    stop, seen = threading.Event(), []

    def ask():
        import numpy as np

        while not stop.is_set():
            with manager.use("m") as used:
                signature = used.servable.signatures["serving_default"]
                feed = (signature.inputs["x"].name, np.ones((1, 3), np.float32))
                fetch = signature.outputs["scores"].name
                try:
                    ((scores,), _) = used.model.run([feed], [fetch])
                    seen.append((used.number, scores.tolist()))
                except Exception as error:
                    seen.append(error)

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for number in range(2, 8):
        toy.publish(made / "double", folder / str(number))
        manager.poll()
        shutil.rmtree(folder / str(number - 1))
    stop.set()
    for thread in threads:
        thread.join()
    assert {number for number, _ in seen} >= {2, 6}
    assert all(
        scores == [[9.0 if n == 1 else 18.0, 12.0 if n == 1 else 24.0]] for n, scores in seen
    )
