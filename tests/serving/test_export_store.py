"""A version appears complete or not at all, and never in another's place."""

import errno
import multiprocessing
import os
import threading

import pytest

from keras_emr import UserError
from keras_emr_serving import store
from keras_emr_serving.store import ModelFolder, check_version, versions
from tests.cli.harness import snapshot


def fill(staging, text="weights"):
    built = staging / "model"
    (built / "variables").mkdir(parents=True)
    (built / "saved_model.pb").write_text("graph")
    (built / "variables" / "data").write_text(text)
    return built


def publish(root, version="auto", text="weights"):
    folder = ModelFolder(root, "toy")
    with folder.staging() as staging:
        return folder.publish(fill(staging, text), version)


def test_versions_count_up(tmp_path):
    root = tmp_path / "a" / "store"
    assert [publish(root), publish(root), publish(root, 7), publish(root), publish(root, 3)] == [
        *(1, 2, 7, 8, 3)
    ]
    (root / "toy" / "notes").mkdir()
    (root / "toy" / "0010").mkdir()  # what TensorFlow Serving reads as 10
    assert versions(root / "toy") == [1, 2, 3, 7, 8, 10]
    assert publish(root) == 11
    assert sorted(snapshot(root / "toy" / "8")) == ["saved_model.pb", "variables", "variables/data"]
    assert not list((root / "toy").glob(".*"))


@pytest.mark.parametrize("existing", ["5", "005"])
def test_a_version_that_exists_is_not_replaced(tmp_path, existing):
    (tmp_path / "toy" / existing).mkdir(parents=True)  # even an empty one
    before = snapshot(tmp_path)
    with pytest.raises(UserError, match=r"it exists\. Received: 5 .*Expected another number"):
        publish(tmp_path, 5)
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("version", ["0", "-1", "1.5", "x", "", "²", str(2**63), "1e3"])
def test_bad_versions(version):
    with pytest.raises(UserError, match="--version"):
        check_version(version)


def test_good_versions():
    assert [check_version(v) for v in ("auto", "1", 12, "007", str(2**63 - 1))] == [
        *("auto", 1, 12, 7, 2**63 - 1)
    ]


def test_no_number_is_left(tmp_path):
    (tmp_path / "toy" / str(2**63 - 1)).mkdir(parents=True)
    with pytest.raises(UserError, match="no number is left"):
        publish(tmp_path)


@pytest.mark.parametrize("name", ["a/b", "..", ".x", "", "7", "a b", "ü", "x" * 201, "-x", "a\n"])
def test_bad_names(tmp_path, name):
    with pytest.raises(UserError, match="--name"):
        ModelFolder(tmp_path, name)


def test_what_is_no_store(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="--to: not a folder"):
        ModelFolder(tmp_path / "file", "toy")
    with pytest.raises(UserError, match="a file is in the way"):
        ModelFolder(tmp_path, "file")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(UserError, match="a file is in the way"):
        ModelFolder(tmp_path, "link")
    publish(tmp_path / "store")
    with pytest.raises(UserError, match=r"folder of one model.*--name toy"):
        ModelFolder(tmp_path / "store" / "toy", "other")
    with pytest.raises(UserError, match="folder of one model"):
        ModelFolder(tmp_path / "store" / "toy" / "1", "other")
    (tmp_path / "saved" / "toy").mkdir(parents=True)
    (tmp_path / "saved" / "toy" / "saved_model.pb").touch()
    with pytest.raises(UserError, match="not the folder of a model's versions"):
        ModelFolder(tmp_path / "saved", "toy")


def _publish_some(root, n, done):
    done.extend(publish(root, text=f"{os.getpid()}-{i}") for i in range(n))


def _in_process(root, n, queue):
    done = []
    _publish_some(root, n, done)
    queue.put(done)


def test_many_at_a_time_get_a_version_each(tmp_path):
    fork = multiprocessing.get_context("spawn")
    queue = fork.Queue()
    others = [fork.Process(target=_in_process, args=(tmp_path, 10, queue)) for _ in range(2)]
    done = []
    threads = [threading.Thread(target=_publish_some, args=(tmp_path, 10, done)) for _ in range(2)]
    for worker in (*others, *threads):
        worker.start()
    numbers = [*queue.get(timeout=60), *queue.get(timeout=60)]
    for worker in (*others, *threads):
        worker.join()
    assert sorted(numbers + done) == list(range(1, 41)) == versions(tmp_path / "toy")
    texts = [(tmp_path / "toy" / str(n) / "variables" / "data").read_text() for n in range(1, 41)]
    assert len(set(texts)) >= 20 and not list((tmp_path / "toy").glob(".*"))


def test_of_two_exports_to_one_number_the_second_fails(tmp_path):
    folder = ModelFolder(tmp_path, "toy")
    with folder.staging() as first, folder.staging() as second:
        assert first != second and second.exists()  # the second did not sweep the first
        one, two = fill(first, "one"), fill(second, "two")
        assert folder.publish(one, 4) == 4
        with pytest.raises(UserError, match="it exists"):
            folder.publish(two, 4)
    assert (tmp_path / "toy" / "4" / "variables" / "data").read_text() == "one"
    assert os.listdir(tmp_path / "toy") == ["4"]


def _die(root, ready):
    folder = ModelFolder(root, "toy")
    with folder.staging() as staging:
        fill(staging)
        ready.set()
        threading.Event().wait()


def test_what_a_killed_export_leaves_is_no_version_and_goes(tmp_path):
    fork = multiprocessing.get_context("spawn")
    ready = fork.Event()
    process = fork.Process(target=_die, args=(tmp_path, ready))
    process.start()
    assert ready.wait(60)
    (left,) = os.listdir(tmp_path / "toy")
    assert left.startswith(".partial-") and versions(tmp_path / "toy") == []
    assert publish(tmp_path) == 1  # while the other is at work
    assert sorted(os.listdir(tmp_path / "toy")) == [left, "1"]
    process.kill()
    process.join()
    assert publish(tmp_path) == 2
    assert sorted(os.listdir(tmp_path / "toy")) == ["1", "2"]


@pytest.mark.parametrize("name", ["rename", "fsync"])
def test_a_disk_that_refuses(tmp_path, monkeypatch, name):
    publish(tmp_path)
    before = snapshot(tmp_path)

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(store.os, name, full)
        with pytest.raises(UserError, match="--to: cannot write there: No space left"):
            publish(tmp_path)
    assert snapshot(tmp_path) == before


def test_files_reach_the_disk_before_the_name_appears(tmp_path, monkeypatch):
    calls = []
    sync, rename = os.fsync, os.rename

    def note_sync(descriptor):
        calls.append(os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}")))
        sync(descriptor)

    def note_rename(*paths):
        calls.append("rename")
        rename(*paths)

    monkeypatch.setattr(store.os, "fsync", note_sync)
    monkeypatch.setattr(store.os, "rename", note_rename)
    publish(tmp_path)
    assert set(calls[:4]) == {"model", "variables", "saved_model.pb", "data"}
    assert calls[4:] == ["rename", "toy"]


def test_a_failure_leaves_no_folder_that_was_not_there(tmp_path):
    folder = ModelFolder(tmp_path / "new" / "store", "toy")
    with pytest.raises(KeyboardInterrupt), folder.staging() as staging:
        fill(staging)
        raise KeyboardInterrupt
    assert os.listdir(tmp_path) == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_store_that_cannot_be_written_to(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match="--to: cannot write there: Permission denied"):
        publish(tmp_path)
