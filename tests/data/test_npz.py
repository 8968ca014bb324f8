"""Reading .npz files, good and damaged."""

import io

import numpy as np
import pytest

from keras_emr.data import load
from keras_emr.data.npz import read_npz
from keras_emr.errors import UserError


def arrays():
    rng = np.random.default_rng(0)
    return {
        "x_train": rng.integers(0, 256, (40, 6, 6), np.uint8),
        "y_train": np.arange(40) % 4,
        "x_test": rng.integers(0, 256, (8, 6, 6), np.uint8),
        "y_test": np.arange(8) % 4,
    }


def refused(path, match_start):
    """The message of the error that reading ``path`` gives, once it is known to be one line."""
    with pytest.raises(UserError) as caught:
        read_npz(path)
    message = str(caught.value)
    assert message.startswith(match_start) and repr(str(path)) in message
    assert "\n" not in message
    return message


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_reading(tmp_path, save):
    path = tmp_path / "mine.npz"
    save(path, **arrays(), notes=np.array("ignored"), pickled=np.array([{}], object))
    got = read_npz(path)
    assert list(got) == ["x_train", "y_train", "x_test", "y_test"]
    for key, value in arrays().items():
        assert got[key].dtype == value.dtype
        np.testing.assert_array_equal(got[key], value)

    data = load(str(path), validation=0.1)
    assert data.name == "mine"
    assert (data.image_shape, data.classes) == ((6, 6, 1), 4)
    assert [len(data.x_train), len(data.x_val), len(data.x_test)] == [36, 4, 8]
    np.testing.assert_array_equal(
        data.x_test[..., 0], arrays()["x_test"].astype(np.float32) / np.float32(255)
    )


def test_a_validation_set_in_the_file_is_used(tmp_path):
    path = tmp_path / "mine.npz"
    x_val = np.full((3, 6, 6), 0.25)
    np.savez(path, **arrays(), x_val=x_val, y_val=np.array([3, 2, 1]))
    data = load(path, validation=0.5)
    assert [len(data.x_train), len(data.x_val), len(data.x_test)] == [40, 3, 8]
    assert data.y_val.tolist() == [3, 2, 1]
    np.testing.assert_array_equal(data.x_val[..., 0], x_val)


def test_missing_arrays_are_named(tmp_path):
    path = tmp_path / "mine.npz"
    given = arrays()
    np.savez(path, x_train=given["x_train"], y=given["y_train"])
    message = refused(path, "data file lacks y_train, x_test, y_test. Received: ")
    assert "with x_train, y. Expected x_train, y_train, x_test, y_test" in message
    np.savez(path, **given, x_val=given["x_test"])
    refused(path, "data file lacks y_val. Received: ")
    np.savez(path)
    assert "with no arrays." in refused(path, "data file lacks x_train, y_train, x_test, y_test.")


def test_file_not_found(tmp_path):
    path = tmp_path / "nowhere.npz"
    assert refused(path, "data file not found.") == (
        f"data file not found. Received: {str(path)!r}. Check the path."
    )


UNREADABLE = "data file is not a readable .npz archive. Received: "


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_a_truncated_file(tmp_path, save):
    buffer = io.BytesIO()
    save(buffer, **arrays())
    raw = buffer.getvalue()
    path = tmp_path / "cut.npz"
    cuts = [0, 1, 3, 4, 30, 100, len(raw) // 4, len(raw) // 2, len(raw) - 100, len(raw) - 1]
    for size in cuts:
        path.write_bytes(raw[:size])
        message = refused(path, UNREADABLE)
        assert message.endswith(" Copy it again, or write it again with numpy.savez_compressed.")


def test_damaged_bytes(tmp_path):
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays())
    raw = buffer.getvalue()
    path = tmp_path / "flipped.npz"
    for position in range(70, 1000, 47):  # inside x_train, past what zip readers skip
        damaged = bytearray(raw)
        damaged[position] ^= 0xFF
        path.write_bytes(damaged)
        refused(path, UNREADABLE)


def test_files_that_are_something_else(tmp_path):
    path = tmp_path / "other.npz"
    path.write_text("x_train,y_train\n1,2\n")
    assert "(ValueError: not a zip archive)" in refused(path, UNREADABLE)
    with path.open("wb") as file:
        np.save(file, arrays()["x_train"])
    assert "it holds one array, not an archive of arrays" in refused(path, UNREADABLE)
    folder = tmp_path / "folder.npz"
    folder.mkdir()
    assert "IsADirectoryError" in refused(folder, UNREADABLE)


def test_pickles_are_never_loaded(tmp_path):
    path = tmp_path / "pickled.npz"
    ragged = np.array([np.zeros(2), np.zeros(3)], dtype=object)
    np.savez(path, **{**arrays(), "x_train": ragged})
    assert refused(path, "x_train: ") == (
        f"x_train: a plain numeric array is needed. Received: an object array in {str(path)!r}."
        " Make all images the same size, stack them and save again."
    )


def test_bad_content_is_refused_by_field(tmp_path):
    path = tmp_path / "mine.npz"
    np.savez(path, **{**arrays(), "y_test": np.zeros(8)})
    with pytest.raises(UserError, match=r"^y_test: labels must be integers\. Received: dtype"):
        load(path)
