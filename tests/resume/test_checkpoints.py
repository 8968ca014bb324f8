"""Checkpoints on disk: damaged, of others, on a full disk, and killed while they are written."""

import errno
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest

from keras_emr.errors import NotWritten, UserError
from keras_emr.training import checkpoints as module
from keras_emr.training.checkpoints import Checkpoints, Position
from keras_emr.training.intervals import Every
from keras_emr.training.writing import flush
from tests.builders import assert_same_arrays

pytestmark = pytest.mark.skipif(
    os.environ["KERAS_BACKEND"] != "tensorflow", reason="no backend takes part"
)
IDENTITY = {"network": "tiny", "defense": {"class_name": "AT", "config": {"beta": 1.5}}}
PLACES = [Position(-1, 7), Position(0, 3), Position(0, 12), Position(1, 0), Position(9, 5)]


def content(i):
    """Different arrays for every number, and a state."""
    arrays = {"state/0": np.arange(6, dtype="float32").reshape(2, 3) + i, "state/1": np.int64(i)}
    return arrays, {"identity": IDENTITY, "history": [{"loss": 0.1 + i}], "logs": None}


def store(folder, count=2):
    """What it was told, and the folder with ``count`` checkpoints having been written."""
    told = []
    made = Checkpoints(folder, told.append)
    for i, place in enumerate(PLACES[:count]):
        made.save(place, *content(i))
    return made, told


def assert_holds(found, i):
    arrays, state = content(i)
    assert found.position == PLACES[i]
    assert_same_arrays(found.arrays, {k: np.asarray(v) for k, v in arrays.items()})
    assert {k: found.state[k] for k in state} == state


def test_the_two_newest_are_kept_in_the_order_of_training(tmp_path):
    made, told = store(tmp_path, len(PLACES))
    assert sorted(p.name for p in tmp_path.iterdir()) == [p.name for p in PLACES[-2:]]
    assert [str(p) for p in PLACES[:3]] == [
        "the maximizer's warm-up, step 7",
        "epoch 1, step 3",
        "epoch 1, step 12",
    ]
    assert_holds(Checkpoints(tmp_path).newest(IDENTITY), len(PLACES) - 1)
    made.clear()
    assert not list(tmp_path.iterdir()) and made.newest(IDENTITY) is None and not told


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def shorten(path):
    path.write_bytes(path.read_bytes()[:-1])


DAMAGES = {"flipped": flip, "shortened": shorten, "emptied": lambda p: p.write_bytes(b"")}
DAMAGES |= {"missing": lambda p: p.unlink(), "a folder": lambda p: (p.unlink(), p.mkdir())}


@pytest.mark.parametrize("file", ["arrays.npz", "state.json", "manifest.json"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_one_is_named_and_skipped(tmp_path, capfd, file, damage):
    store(tmp_path)
    newest = tmp_path / PLACES[1].name
    DAMAGES[damage](newest / file)
    again = Checkpoints(tmp_path)
    assert_holds(again.newest(IDENTITY), 0)
    err = capfd.readouterr().err
    assert err.count("\n") == 1 and err.startswith(f"Warning: checkpoint skipped: {file} ")
    assert repr(str(newest)) in err and PLACES[0].name in err
    # What is written next replaces the damaged one, and keeps the one that was used.
    again.save(PLACES[1], *content(1))
    assert sorted(p.name for p in tmp_path.iterdir()) == [p.name for p in PLACES[:2]]
    assert_holds(Checkpoints(tmp_path).newest(IDENTITY), 1)


def test_every_single_byte_counts(tmp_path):
    store(tmp_path)
    newest = tmp_path / PLACES[1].name
    rng = np.random.default_rng(0)
    for file in ("arrays.npz", "state.json", "manifest.json"):
        whole = (newest / file).read_bytes()
        for place in rng.choice(len(whole), 60, replace=False):
            changed = bytearray(whole)
            changed[place] ^= 1 << rng.integers(8)
            (newest / file).write_bytes(changed)
            told = []
            found = Checkpoints(tmp_path, told.append).newest(IDENTITY)
            # Blanks between the words of JSON say nothing.
            assert (found.position == PLACES[0] and len(told) == 1) or found.position == PLACES[1]
            if found.position == PLACES[1]:
                assert_holds(found, 1)
        (newest / file).write_bytes(whole)


def test_no_usable_one_is_an_error_that_says_so(tmp_path):
    store(tmp_path)
    for place in PLACES[:2]:
        flip(tmp_path / place.name / "arrays.npz")
    told = []
    with pytest.raises(
        UserError, match=r"no checkpoint can be used: arrays\.npz .*Received: "
    ) as e:
        Checkpoints(tmp_path, told.append).newest(IDENTITY)
    assert "--overwrite" in str(e.value) and "\n" not in str(e.value) and len(told) == 1


def test_of_a_later_version(tmp_path, monkeypatch):
    made, _ = store(tmp_path)
    monkeypatch.setattr(module, "FORMAT", 2)
    made.save(PLACES[2], *content(2))
    monkeypatch.undo()
    with pytest.raises(UserError, match=r"later version .*format 2\. Expected format 1 .*Upgrade"):
        Checkpoints(tmp_path).newest(IDENTITY)


@pytest.mark.parametrize(
    ("change", "field", "ours"),
    [
        ({"network": "large"}, "network", "large"),
        ({"defense": {"class_name": "MART", "config": {"beta": 2.0}}}, "defense", "MART"),
        ({"defense": {"class_name": "AT", "config": {"beta": 2.0}}}, "defense beta", "2.0"),
        ({"more": None, "seed": 3}, "seed", "3"),
        ({"defense": None}, "defense", "null"),
    ],
)
def test_of_another_model(tmp_path, change, field, ours):
    store(tmp_path)
    message = rf"^the checkpoint is of another {field}\. Received: {ours}, while "
    with pytest.raises(UserError, match=message) as error:
        Checkpoints(tmp_path).newest({**IDENTITY, **change})
    assert "\n" not in str(error.value)


def test_nothing_in_a_checkpoint_is_run(tmp_path):
    """An array of objects would be a pickle: it cannot be written, and is not read."""
    store(tmp_path)
    trap = tmp_path / "trap.npz"
    np.savez(trap, **{"state/0": np.array([print], dtype=object)})
    newest = tmp_path / PLACES[1].name
    shutil.copy(trap, newest / "arrays.npz")
    (newest / "manifest.json").write_text(module._manifest(newest))
    with pytest.raises(ValueError, match="allow_pickle=False"):
        Checkpoints(tmp_path).newest(IDENTITY)


def test_a_full_disk_leaves_what_was_there(tmp_path, monkeypatch):
    made, _ = store(tmp_path)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    for target in ("numpy.savez", "pathlib.Path.write_text", "os.fsync", "os.replace"):
        with monkeypatch.context() as patch:
            patch.setattr(target, full)
            with pytest.raises(NotWritten, match="cannot write: No space left on device") as error:
                made.save(PLACES[2], *content(2))
        assert repr(str(tmp_path / PLACES[2].name)) in str(error.value)
        assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before, target
    made.save(PLACES[2], *content(2))
    assert_holds(Checkpoints(tmp_path).newest(IDENTITY), 2)


LIMITED = """
import resource, signal, sys
import numpy as np
from keras_emr.errors import NotWritten
from keras_emr.training.checkpoints import Checkpoints, Position
made = Checkpoints(sys.argv[1])
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
try:
    made.save(Position(5, 0), {"state/0": np.zeros(100_000)}, {"identity": {}})
except NotWritten as error:
    print(error)
"""


def test_a_file_that_the_system_refuses(tmp_path):
    store(tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, tmp_path], capture_output=True, text=True, timeout=60
    )
    assert "cannot write: File too large" in done.stdout, done.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == [p.name for p in PLACES[:2]]
    assert_holds(Checkpoints(tmp_path).newest(IDENTITY), 1)


class Killed(BaseException):
    """The process is gone: nothing that it would still do is done."""


def test_killed_at_any_call_to_the_system(tmp_path, monkeypatch):
    """After each of a save's calls that change the disk; nothing is cleaned up afterwards."""
    seen = set()
    for calls in range(1, 40):
        folder = tmp_path / str(calls)
        made, _ = store(folder)
        left = [calls]

        def step(real, left=left):
            def call(*args, **kwargs):
                if left[0] <= 0:
                    raise Killed
                left[0] -= 1
                return real(*args, **kwargs)

            return call

        with monkeypatch.context() as patch:
            patch.setattr(module, "flush", step(flush))
            patch.setattr(module.np, "savez", step(np.savez))
            patch.setattr(module.os, "replace", step(module.os.replace))
            patch.setattr(module, "remove_folder", step(module.remove_folder))
            patch.setattr(module.shutil, "rmtree", step(shutil.rmtree))
            try:
                made.save(PLACES[2], *content(2))
            except Killed:
                seen.add(tuple(sorted(p.name for p in folder.iterdir())))
                finished = False
            else:
                finished = True
        told = []
        found = Checkpoints(folder, told.append).newest(IDENTITY)
        assert found.position in PLACES[1:3] and not told, calls
        assert_holds(found, PLACES.index(found.position))
        again = Checkpoints(folder)
        again.newest(IDENTITY)
        again.save(PLACES[3], *content(3))
        assert sorted(p.name for p in folder.iterdir()) == [found.position.name, PLACES[3].name]
        if finished:
            break
    else:
        raise AssertionError("never finished")
    assert calls > 5 and len(seen) >= 3  # before, beside, and after the one before


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("90s", Every(seconds=90)),
        ("10m", Every(seconds=600)),
        ("2h", Every(seconds=7200)),
        ("600", Every(seconds=600)),
        (600, Every(seconds=600)),
        ("1.5 m", Every(seconds=90)),
        ("500steps", Every(steps=500)),
        ("1 step", Every(steps=1)),
    ],
)
def test_intervals(text, expected):
    assert Every.parse(text) == expected
    assert Every.parse(expected) is expected


@pytest.mark.parametrize("text", ["0", "0steps", "-5", "soon", "10 epochs", "", "nan", "1.5steps"])
def test_bad_intervals(text):
    with pytest.raises(UserError, match=r"bad interval between checkpoints\. Received: ") as error:
        Every.parse(text)
    assert repr(text) in str(error.value) and "500steps" in str(error.value)


def test_an_interval_is_over_when_either_is():
    every = Every.parse("10m")
    assert not every.over(599, 10**9) and every.over(600, 0)
    assert Every.parse("3steps").over(0, 3) and not Every.parse("3steps").over(10**9, 2)


def test_the_manifest_names_what_is_there(tmp_path):
    store(tmp_path, 1)
    manifest = json.loads((tmp_path / PLACES[0].name / "manifest.json").read_text())
    assert manifest["format"] == 1 and set(manifest["files"]) == {"arrays.npz", "state.json"}
