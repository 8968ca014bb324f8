"""Images on disk are looked at once; again only where a file has changed."""

import os

import numpy as np
import pytest

from keras_emr.data import image_folder, load, scan_cache
from keras_emr.errors import UserError
from tests.data.pictures import folder, picture, save


@pytest.fixture()
def images(tmp_path):
    folder(tmp_path / "images", n=(6, 2, 2))
    return tmp_path / "images"


@pytest.fixture()
def looked(monkeypatch):
    """The files whose pixels have been read."""
    seen, read = [], image_folder.read_picture

    def noting(path, *arguments):
        seen.append(path)
        return read(path, *arguments)

    monkeypatch.setattr(image_folder, "read_picture", noting)
    return seen


def same(a, b):
    assert a.fingerprint == b.fingerprint
    for (x, y), (other_x, other_y) in zip(a.splits.values(), b.splits.values(), strict=True):
        np.testing.assert_array_equal(y, other_y)
        np.testing.assert_array_equal(np.asarray(x), np.asarray(other_x))
        assert (x.min(), x.max()) == (other_x.min(), other_x.max())


def test_a_second_start_reads_no_image(images, looked):
    first = load(images, stream="always")
    assert len(looked) == 20
    looked.clear()
    second = load(images, stream="always")
    assert not looked
    same(first, second)
    same(first, load(images, stream="never"))


def test_a_changed_image_is_seen(images, looked):
    before = load(images, stream="always")
    path = images / "train" / "ant" / "00.png"
    stat = path.stat()
    save(path, picture(999))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    looked.clear()
    after = load(images, stream="always")
    assert len(looked) == 12  # the other splits have not changed
    assert after.fingerprint != before.fingerprint
    same(after, load(images, stream="never"))


def test_another_size_is_another_scan(images):
    for size in ("6x5", "3x4"):
        same(
            load(images, stream="always", image_size=size),
            load(images, stream="never", image_size=size),
        )


def test_what_is_held_in_memory_is_read_anyway_and_not_kept(images, scans):
    load(images, stream="never")
    assert not scans.exists()


def test_a_bad_image_is_told_every_time(images, scans):
    (images / "train" / "bee" / "01.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    for _ in range(2):
        assert len(load(images, stream="always", skip_bad=True).skipped) == 1
        with pytest.raises(UserError, match="bee"):
            load(images, stream="always")


@pytest.mark.parametrize("damage", [b"", b"PK\x03\x04", None])
def test_a_damaged_scan_is_made_anew(images, scans, looked, damage):
    first = load(images, stream="always")
    kept = sorted(scans.iterdir())
    assert len(kept) == 3 and all(path.suffix == ".npz" for path in kept)
    for path in kept:
        path.write_bytes(path.read_bytes()[:-40] if damage is None else damage)
    looked.clear()
    same(first, load(images, stream="always"))
    assert len(looked) >= 20
    looked.clear()
    load(images, stream="always")
    assert not looked


def test_a_scan_that_cannot_be_kept_costs_nothing_else(images, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setattr(scan_cache, "cache_folder", lambda: tmp_path / "file" / "scans")
    same(load(images, stream="always"), load(images, stream="never"))


def test_the_folder_of_scans(monkeypatch, tmp_path):
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert scan_cache.cache_folder() == tmp_path / "keras_emr" / "scans"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/ann")
    assert str(scan_cache.cache_folder()) == "/home/ann/.cache/keras_emr/scans"


def test_progress(images):
    told = []
    load(images, stream="never", progress=lambda done, total: told.append((done, total)))
    assert told[-1] == (20, 20) and [done for done, _ in told] == sorted(done for done, _ in told)
