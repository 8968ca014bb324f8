"""The nine classes of Restricted ImageNet, from a folder as ImageNet's is."""

import pytest

from keras_emr.data import load
from keras_emr.data.registry import located
from keras_emr.data.restricted_imagenet import RANGES, superclasses
from keras_emr.errors import UserError
from tests.data.pictures import picture, save

IDS = [f"n{i * 7:08}" for i in range(1000)]


def test_members_and_their_number():
    members = superclasses([*IDS[::-1], "not-a-class"])  # in whatever order they are found
    assert {name: len(ids) for name, ids in members.items()} == {
        **{"dog": 118, "cat": 5, "frog": 3, "turtle": 5, "bird": 21},
        **{"monkey": 18, "fish": 9, "crab": 4, "insect": 20},
    }
    assert members["cat"] == tuple(IDS[281:286])
    assert len({i for ids in members.values() for i in ids}) == 203


def test_a_folder_becomes_nine_classes(tmp_path):
    seed = 0
    for i, name in enumerate(IDS):
        (tmp_path / "train" / name).mkdir(parents=True)
        (tmp_path / "val" / name).mkdir(parents=True)
        if any(first <= i <= last for first, last in RANGES.values()):
            for split, n in (("train", 2), ("val", 1)):
                for k in range(n):
                    save(tmp_path / split / name / f"{k}.png", picture(seed, (3, 3, 3)))
                    seed += 1
    data = load(f"restricted-imagenet:{tmp_path}")
    assert (data.classes, data.class_names) == (9, tuple(RANGES))
    assert (len(data.x_train) + len(data.x_val), len(data.x_test)) == (406, 203)
    counts = [list(data.y_test).count(label) for label in range(9)]
    assert counts == [118, 5, 3, 5, 21, 18, 9, 4, 20]
    (tmp_path / "train" / IDS[0]).rmdir()
    with pytest.raises(UserError, match=r"1000 class folders, .* Received: 999 folders"):
        load(f"restricted-imagenet:{tmp_path}")


def test_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert located("restricted-imagenet:i") == f"restricted-imagenet:{tmp_path / 'i'}"
    with pytest.raises(UserError, match="data folder not found"):
        load("restricted-imagenet:i")
