"""TFDS data sets that are prepared here and read back, where tensorflow-datasets is installed."""

import dataclasses
import shutil
import subprocess
import sys

import numpy as np
import pytest

from keras_emr.data import load
from keras_emr.data.prepare import FILE_FORMATS, prepare, target
from keras_emr.data.registry import open_source
from keras_emr.errors import UserError
from tests.data.pictures import folder

pytest.importorskip("tensorflow_datasets")
pytest.importorskip("importlib_resources")


def message(source, **options):
    with pytest.raises(UserError) as caught:
        load(source, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A folder of pictures, and where it is prepared in both formats as ``FORMAT:1.0.0``."""
    root = tmp_path_factory.mktemp("tfds")
    folder(root / "insects", n=(9, 4, 3), shape=(8, 7, 3))
    source = open_source(str(root / "insects"))
    for file_format in FILE_FORMATS:
        made = prepare(
            source, file_format, data_dir=root / "there", file_format=file_format, licence="CC0"
        )
        assert made == root / "there" / file_format / "1.0.0"
    return root / "insects", root / "there"


@pytest.mark.parametrize("file_format", FILE_FORMATS)
@pytest.mark.parametrize("stream", ["never", "always"])
def test_what_is_prepared_is_what_is_read(prepared, file_format, stream):
    pictures, there = prepared
    data = load(f"tfds:{file_format}", tfds_dir=there, stream=stream)
    plain = load(pictures)
    assert (data.streamed, data.licence) == (stream == "always", "CC0")
    assert data.class_names == plain.class_names == ("ant", "bee")
    assert data.fingerprint == plain.fingerprint
    for (x, y), (plain_x, plain_y) in zip(data.splits.values(), plain.splits.values(), strict=True):
        np.testing.assert_array_equal(np.asarray(x), plain_x)
        np.testing.assert_array_equal(x[np.array([5, 0])], plain_x[[5, 0]])
        np.testing.assert_array_equal(y, plain_y)


def test_tfds_itself_reads_it(prepared):
    import tensorflow_datasets as tfds

    pictures, there = prepared
    plain = load(pictures)
    builder = tfds.builder_from_directory(there / "array_record" / "1.0.0")
    source = builder.as_data_source("validation")
    assert [int(e["label"]) for e in source] == plain.y_val.tolist()
    np.testing.assert_array_equal(
        np.stack([e["image"] for e in source]) / np.float32(255), plain.x_val
    )
    assert builder.info.supervised_keys == ("image", "label")


def test_nothing_of_tensorflow_is_imported(prepared):
    code = (
        "import sys; from keras_emr.data import load\n"
        f"for name in {FILE_FORMATS}:\n"
        f"    load('tfds:' + name, tfds_dir={str(prepared[1])!r}, stream='always').x_train[:]\n"
        "print('tensorflow' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.split() == ["False"], done.stderr


def test_npz_and_other_image_sizes(prepared, tmp_path):
    there = prepared[1]
    x = np.random.default_rng(0).integers(0, 256, (30, 5, 5), np.uint8)
    y = np.arange(30) % 3
    np.savez(tmp_path / "a.npz", x_train=x, y_train=y, x_test=x[::-1] / 255, y_test=y)
    prepare(open_source(str(tmp_path / "a.npz")), "grey", version="0.2.0", data_dir=tmp_path)
    prepare(open_source(str(tmp_path / "a.npz")), "grey", version="0.10.0", data_dir=tmp_path)
    data = load("tfds:grey", tfds_dir=tmp_path)  # the higher of the two
    plain = load(tmp_path / "a.npz")
    assert data.licence == plain.licence and data.class_names == ("0", "1", "2")
    for (a, _), (b, _) in zip(data.splits.values(), plain.splits.values(), strict=True):
        np.testing.assert_array_equal(a, b)  # divided in the same way, too
    shutil.rmtree(tmp_path / "grey" / "0.10.0")
    assert len(load("tfds:grey:0.2.0", tfds_dir=tmp_path).x_test) == 30
    small = load("tfds:array_record", tfds_dir=there, image_size="4x4")
    assert small.x_train.shape == (18, 4, 4, 3)


def test_no_such_data_set(prepared, monkeypatch):
    there = prepared[1]
    said = message("tfds:array_recor", tfds_dir=there)
    assert said == (
        "tfds: not prepared here, and nothing is downloaded. Expected one of: array_record,"
        " tfrecord (did you mean 'array_record'?). Received: 'tfds:array_recor' with --tfds-dir"
        f" {str(there)!r}. Make one with: keras-emr data prepare"
    )
    monkeypatch.setenv("TFDS_DATA_DIR", str(there))
    assert message("tfds:array_record:2.0.0").startswith(
        "tfds: version 2.0.0 is not prepared here. Expected one of: 1.0.0. Received: "
    )
    assert message("tfds:").startswith("tfds: not a name. Received: 'tfds:'.")
    assert message("tfds:../x").startswith("tfds: not a name.")
    assert message("tfds:tfrecord", skip_bad=True).startswith("skip_bad: only for")


@pytest.mark.parametrize("file_format", FILE_FORMATS)
def test_damaged_files(prepared, tmp_path, file_format):
    shutil.copytree(prepared[1], tmp_path / "t")
    version = tmp_path / "t" / file_format / "1.0.0"
    (records,) = version.glob("*-train.*")
    whole = records.read_bytes()
    for damage in (whole[: len(whole) // 2], b"", whole[:100] + bytes(400) + whole[500:]):
        records.write_bytes(damage)
        said = message(f"tfds:{file_format}", tfds_dir=tmp_path / "t")
        assert said.startswith(("tfds: records cannot be read: ", "image cannot be read: "))
    (version / "dataset_info.json").write_text("{")
    assert message(f"tfds:{file_format}", tfds_dir=tmp_path / "t").startswith("tfds: records")


def test_nothing_is_left_of_what_fails(prepared, tmp_path):
    source = open_source(str(prepared[0]))
    part = source.parts["val"]

    def interrupted(index):
        if index[0] == 5:
            raise KeyboardInterrupt
        return part.read(index)

    source.parts["val"] = dataclasses.replace(part, read=interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepare(source, "broken", data_dir=tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "version", "said"),
    [
        ("My", "1.0.0", "name: not a name"),
        ("a/b", "1.0.0", "name: not a name"),
        ("a", "1.0", "version: not a version"),
        ("array_record", "1.0.0", "this version is there already"),
    ],
)
def test_bad_names(prepared, name, version, said):
    with pytest.raises(UserError, match=said):
        target(name, version, prepared[1])


def test_images_that_are_no_bytes(tmp_path):
    with pytest.raises(UserError, match="x_train: images do not fit into bytes"):
        open_source("digits")
