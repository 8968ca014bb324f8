"""Finding a data set by what the user wrote."""

import json

import numpy as np
import pytest

from keras_emr.data import available, load
from keras_emr.errors import UserError

KINDS = "digits, FILE.npz, FOLDER (of idx files, or of class folders), tfds:NAME[:VERSION]"


def message(source):
    with pytest.raises(UserError) as caught:
        load(source)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_unknown_name():
    assert message("digit") == (
        f"unknown data. Received: 'digit'. Expected one of: {KINDS} (did you mean 'digits'?)"
    )
    assert message("qqq") == f"unknown data. Received: 'qqq'. Expected one of: {KINDS}"


@pytest.mark.parametrize("source", ["nowhere.npz", "no/where", "/no/where.npz", "x" * 5000 + "/y"])
def test_a_path_that_is_not_there(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert message(source) == f"data file not found. Received: {source!r}. Check the path."


@pytest.mark.parametrize("source", ["", 3, None, ["digits"]])
def test_not_a_name_at_all(source):
    assert message(source) == f"data must be a name or a path. Received: {source!r}. Try 'digits'."


def test_a_file_of_another_kind(tmp_path):
    path = tmp_path / "images.csv"
    path.write_text("1,2")
    assert message(str(path)) == (
        f"data file is of an unknown kind. Received: {str(path)!r}. Expected one of: {KINDS}"
    )


def test_a_folder_without_idx_files(tmp_path):
    assert message(str(tmp_path)).startswith("idx file not found: train-images-idx3-ubyte")


def test_a_name_wins_over_a_folder_which_a_path_still_reaches(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "digits").mkdir()
    assert len(load("digits").x_test) == 360
    assert message("./digits").startswith("idx file not found")


def test_home_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    x, y = np.zeros((4, 2, 2), np.uint8), np.array([0, 1, 0, 1])
    np.savez(tmp_path / "mine.NPZ.npz", x_train=x, y_train=y, x_test=x, y_test=y)
    data = load("~/mine.NPZ.npz", validation=0.5)
    assert data.name == "mine.NPZ"
    assert [len(data.x_train), len(data.x_val), len(data.x_test)] == [2, 2, 4]


def test_available_agrees_with_what_is_loaded():
    rows = available()
    assert [row["name"] for row in rows] == [
        "digits",
        "FILE.npz",
        "FOLDER",
        "FOLDER",
        "restricted-imagenet:FOLDER",
        "tfds:NAME[:VERSION]",
    ]
    assert all(list(row) == ["name", "what", "images", "classes", "shape"] for row in rows)
    digits, data = rows[0], load("digits")
    assert digits["images"] == len(data.x_train) + len(data.x_val) + len(data.x_test) == 1797
    assert (digits["classes"], digits["shape"]) == (data.classes, data.image_shape)
    sizes = f"{len(data.x_train)} train, {len(data.x_val)} val, {len(data.x_test)} test"
    assert digits["what"].endswith(sizes)
    json.dumps(rows)
