"""``keras-emr data``, and training on what it knows beside arrays."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from keras_emr.data import load
from tests.cli.harness import TINY, assert_error, call, history, snapshot, write_data
from tests.data.pictures import folder, picture, save

pytestmark = pytest.mark.usefixtures("warm_keras")


@pytest.fixture
def insects(tmp_path):
    folder(tmp_path / "insects", n=(16, 6, 5), shape=(6, 6, 3))
    return tmp_path / "insects"


def test_inspect_prints_the_facts_and_draws_the_samples(capfd, insects):
    shutil.copy(insects / "train" / "ant" / "00.png", insects / "train" / "ant" / "copy.png")
    result = call(capfd, "data", "inspect", insects)
    assert (result.code, result.err) == (0, "")
    rows = [line.split() for line in result.out.splitlines()]
    assert ["0", "ant", "17", "6", "5"] in rows and ["1", "bee", "16", "6", "5"] in rows
    assert ["all", "33", "12", "10"] in rows
    data = load(insects)
    low, high = data.x_train.min(), data.x_train.max()
    assert f"insects: images 6x6x3, 2 classes, pixels {low:g} to {high:g}; in memory" in result.out
    assert "duplicates: 1 train\n" in result.out
    assert f"licence: not stated by the source\nsha256: {data.fingerprint}\n" in result.out
    with Image.open("insects-samples.png") as drawn:
        pixels = np.asarray(drawn.convert("RGB")).reshape(-1, 3)
    # The samples themselves are in it: every colour of the first image, and not of another seed.
    shown = {tuple(p) for p in pixels.tolist()}
    there = [tuple(p) in shown for p in picture(0, (6, 6, 3)).reshape(-1, 3).tolist()]
    assert np.mean(there) > 0.9
    absent = [tuple(p) in shown for p in picture(999, (6, 6, 3)).reshape(-1, 3).tolist()]
    assert np.mean(absent) < 0.1


def test_inspect_json_counts_copies_across_splits(capfd, tmp_path):
    x = np.random.default_rng(0).integers(0, 256, (40, 4, 4, 1), np.uint8)
    y = np.arange(40) % 2
    np.savez("a.npz", x_train=x, y_train=y, x_val=x[30:], y_val=y[30:], x_test=x[:4], y_test=y[:4])
    result = call(capfd, "data", "inspect", "a.npz", "--json", "--picture", "p.png")
    found = json.loads(result.out)
    assert found["duplicates"] == {
        **{"train": 0, "val": 0, "test": 0},
        **{"train in val": 10, "train in test": 4, "val in test": 0},
    }
    assert found["splits"]["val"] == {"images": 10, "per_class": [["0", 5], ["1", 5]]}
    assert found["range"] == [x.min() / np.float32(255), x.max() / np.float32(255)]
    assert (found["picture"], found["skipped"], found["streamed"]) == ("p.png", [], False)
    assert (tmp_path / "p.png").stat().st_size > 1000


def test_inspect_refuses_before_it_reads(capfd, insects, tmp_path):
    (tmp_path / "there.png").write_text("mine")
    before = snapshot(tmp_path)
    for arguments, said in (
        (["--picture", "there.png"], "is there already"),
        (["--picture", "no/where.png"], "no such folder"),
        (["--image-size", "big"], "image_size: bad value"),
    ):
        assert_error(call(capfd, "data", "inspect", insects, *arguments), 3, said)
    assert call(capfd, "data", "inspect", insects, "--picture", "a", "--no-picture").code == 2
    assert snapshot(tmp_path) == before


@pytest.mark.slow
def test_training_on_pictures_in_memory_and_from_disk(capfd, insects, tmp_path):
    (insects / "train" / "ant" / "bad.png").write_text("hello")
    run = ("train", *TINY, "--data", insects, "--epochs", 2, "--augment", "cifar")
    assert_error(call(capfd, *run, "--out", "no"), 3, "bad.png", "--skip-bad")
    assert not (tmp_path / "no").exists()
    held = call(capfd, *run, "--skip-bad", "--out", "held")
    assert held.code == 0, held.err
    assert "Warning: " in held.err and "1 images left out; the first: train/ant/bad.png" in held.err
    stored = call(capfd, *run, "--skip-bad", "--out", "stored", "--stream", "always", "--epochs", 1)
    assert stored.code == 0, stored.err
    resumed = call(capfd, "train", "--out", "stored", "--resume", "--epochs", 2)
    assert resumed.code == 0, resumed.err
    assert history("held") == history("stored") and len(history("held")) == 2
    # The run's own way of reading, from its config: a bad picture is no surprise.
    evaluated = call(
        capfd, "evaluate", "held", "--attacks", "pgd", "--steps", 1, "--extra-examples", 0
    )
    assert evaluated.code == 0, evaluated.err


def test_extra_data_change_the_training_and_are_remembered(capfd, data, tmp_path):
    rng = np.random.default_rng(1)
    np.savez("extra.npz", image=rng.random((30, 8, 8, 1), np.float32), label=np.arange(30) % 2)
    run = ("train", *TINY, "--data", data, "--epochs", 1)
    with_extra = ("--extra-data", "extra.npz", "--extra-ratio", 0.25)
    assert call(capfd, *run, "--out", "plain").code == 0
    assert call(capfd, *run, *with_extra, "--out", "one").code == 0
    assert history("plain")[0]["loss"] != history("one")[0]["loss"]
    assert call(capfd, "train", "--out", "one", "--resume", "--epochs", 2).code == 0
    np.savez("extra.npz", image=rng.random((30, 8, 8, 1), np.float32), label=np.arange(30) % 2)
    changed = call(capfd, "train", "--out", "one", "--resume", "--epochs", 3)
    assert_error(changed, 3, "extra_data: a resumed run needs the data it began with")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--extra-data", "none.npz"], "data file not found"),
        (["--extra-data", "wide.npz"], "must have the shape of the training images"),
        (["--extra-data", "toy.npz", "--extra-ratio", "0.01"], "extra_ratio: leaves a batch"),
        (["--extra-ratio", "0"], "Expected a number > 0 and <= 1"),
        (["--augment", "cifr"], "did you mean 'cifar'"),
        (["--data", "tfds:nothing"], "tfds: not prepared here"),
        (["--stream", "sometimes"], "Expected one of: auto, always, never"),
    ],
)
def test_bad_settings(capfd, tmp_path, arguments, said):
    write_data("toy.npz")
    write_data("wide.npz", shape=(8, 9, 1))
    before = snapshot(tmp_path)
    run = ["train", *TINY, "--data", "toy.npz", "--out", "run", "--tfds-dir", str(tmp_path)]
    assert_error(call(capfd, *run, *arguments), 3, said)
    assert snapshot(tmp_path) == before


def test_prepare(capfd, insects, tmp_path):
    pytest.importorskip("tensorflow_datasets")
    save(insects / "train" / "ant" / "grey.png", picture(5, (6, 6)))
    prepare = ("data", "prepare", insects, "--tfds-dir", tmp_path / "there")
    assert_error(call(capfd, *prepare), 3, "grey.png", "--skip-bad")
    assert not (tmp_path / "there").exists()
    made = call(capfd, *prepare, "--skip-bad", "--file-format", "tfrecord", "--licence", "CC0")
    assert made.code == 0, made.err
    first, line = made.out.splitlines()  # nothing of TFDS among the results
    assert first.startswith("tfds:insects:1.0.0: 32 train, 12 val, 10 test; ")
    shown = call(
        capfd, "data", "inspect", "--json", "--no-picture", line.split()[4], *line.split()[5:]
    )
    found = json.loads(shown.out)
    assert found["licence"] == "CC0"
    assert found["sha256"] == load(insects, skip_bad=True).fingerprint
    again = call(capfd, *prepare, "--skip-bad", "--name", "insects")
    assert_error(again, 3, "this version is there already")


def test_prepare_says_what_is_missing(capfd, insects, tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)  # as where it is not installed
    result = call(capfd, "data", "prepare", insects, "--tfds-dir", tmp_path / "there")
    assert_error(result, 3, "tensorflow-datasets", "pip install 'keras-emr[data]'")
    assert not (tmp_path / "there").exists()
    bad = call(capfd, "data", "prepare", insects, "--name", "My", "--tfds-dir", tmp_path / "there")
    assert_error(bad, 3, "name: not a name of a TFDS data set")
