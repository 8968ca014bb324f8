"""Reading MNIST-style idx folders, good and damaged; the real data where there are any."""

import gzip
import struct

import numpy as np
import pytest

from keras_emr.data import load
from keras_emr.data.idx import read_idx, read_idx_folder
from keras_emr.errors import UserError
from tests.real_data import real_data

NAMES = {
    "x_train": "train-images-idx3-ubyte",
    "y_train": "train-labels-idx1-ubyte",
    "x_test": "t10k-images-idx3-ubyte",
    "y_test": "t10k-labels-idx1-ubyte",
}


def arrays():
    rng = np.random.default_rng(0)
    return {
        "x_train": rng.integers(0, 256, (20, 3, 5), np.uint8),
        "y_train": (np.arange(20) % 2).astype(np.uint8),
        "x_test": rng.integers(0, 256, (6, 3, 5), np.uint8),
        "y_test": (np.arange(6) % 2).astype(np.uint8),
    }


def encode(array, kind=0x08):
    head = bytes([0, 0, kind, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    return head + array.tobytes()


def write(folder, rename=lambda name: name, pack=lambda raw: raw):
    for key, array in arrays().items():
        (folder / rename(NAMES[key])).write_bytes(pack(encode(array)))
    return folder


def refused(read, *args):
    with pytest.raises(UserError) as caught:
        read(*args)
    assert "\n" not in str(caught.value)
    return str(caught.value)


SPELLINGS = {
    "plain": (lambda name: name, lambda raw: raw),
    "gz": (lambda name: name + ".gz", gzip.compress),
    "dotted": (lambda name: name.replace("-idx", ".idx"), lambda raw: raw),
    "dotted gz": (lambda name: name.replace("-idx", ".idx") + ".gz", gzip.compress),
    "gz in name only": (lambda name: name + ".gz", lambda raw: raw),  # unpacked by a browser
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_reading(tmp_path, spelling):
    folder = write(tmp_path, *SPELLINGS[spelling])
    got = read_idx_folder(folder)
    assert list(got) == list(NAMES)
    for key, value in arrays().items():
        assert got[key].dtype == np.uint8
        np.testing.assert_array_equal(got[key], value)


def test_loading_a_folder(tmp_path):
    folder = tmp_path / "tiny"
    folder.mkdir()
    data = load(str(write(folder)), validation=0.2)
    assert (data.name, data.image_shape, data.classes) == ("tiny", (3, 5, 1), 2)
    assert [len(data.x_train), len(data.x_val), len(data.x_test)] == [16, 4, 6]
    np.testing.assert_array_equal(
        data.x_test[..., 0], arrays()["x_test"].astype(np.float32) / np.float32(255)
    )
    assert data.y_test.tolist() == [0, 1, 0, 1, 0, 1]


@pytest.mark.parametrize("key", NAMES)
def test_a_missing_file_is_named(tmp_path, key):
    write(tmp_path)
    (tmp_path / NAMES[key]).unlink()
    message = refused(read_idx_folder, tmp_path)
    assert message.startswith(
        f"idx file not found: {NAMES[key]} (or {NAMES[key]}.gz)."
        f" Received: folder {str(tmp_path)!r}. Expected the four files "
    )


@pytest.mark.parametrize("key", NAMES)
def test_a_truncated_file_is_named(tmp_path, key):
    write(tmp_path)
    path = tmp_path / NAMES[key]
    raw = path.read_bytes()
    path.write_bytes(raw[:-1])
    shape = arrays()[key].shape
    assert refused(read_idx_folder, tmp_path) == (
        f"idx file has the wrong size. Received: {str(path)!r} with {len(raw) - 1} bytes"
        f" (uncompressed). Expected {len(raw)} for shape {shape}: download it again."
    )


@pytest.mark.parametrize("size", [0, 1, 3])
def test_cut_inside_the_magic(tmp_path, size):
    path = tmp_path / "f"
    path.write_bytes(encode(arrays()["x_train"])[:size])
    assert refused(read_idx, path, 3).startswith("not an idx file of uint8 with 3 axes. Received: ")


@pytest.mark.parametrize("size", [4, 10, 15])
def test_cut_inside_the_header(tmp_path, size):
    path = tmp_path / "f"
    path.write_bytes(encode(arrays()["x_train"])[:size])
    assert refused(read_idx, path, 3) == (
        f"idx file has the wrong size. Received: {str(path)!r} with {size} bytes (uncompressed)."
        " Expected a header of 16 bytes: download it again."
    )


def test_trailing_bytes(tmp_path):
    path = tmp_path / "f"
    path.write_bytes(encode(arrays()["x_train"]) + b"\0")
    assert "with 317 bytes (uncompressed). Expected 316 for shape (20, 3, 5)" in refused(
        read_idx, path, 3
    )


def test_an_absurd_header_asks_for_no_memory(tmp_path):
    path = tmp_path / "f"
    path.write_bytes(bytes([0, 0, 8, 3]) + b"\xff" * 12)
    assert f"Expected {16 + (2**32 - 1) ** 3} for shape" in refused(read_idx, path, 3)


def test_wrong_magic(tmp_path):
    path = tmp_path / "f"
    path.write_bytes(encode(np.zeros((2, 3, 5), ">f4"), kind=0x0D))
    assert refused(read_idx, path, 3) == (
        f"not an idx file of uint8 with 3 axes. Received: {str(path)!r}, which starts with"
        " 0x00000d03. Expected 0x00000803: check that this is the right file."
    )
    path.write_bytes(encode(arrays()["y_train"]))  # labels where the images should be
    assert "0x00000801. Expected 0x00000803" in refused(read_idx, path, 3)
    path.write_text("<html>404 Not Found</html>")
    assert "which starts with 0x3c68746d." in refused(read_idx, path, 3)


def test_truncated_gzip(tmp_path):
    write(tmp_path, *SPELLINGS["gz"])
    path = tmp_path / (NAMES["x_train"] + ".gz")
    raw = path.read_bytes()
    for size in (2, 5, 15, len(raw) // 2, len(raw) - 9, len(raw) - 1):
        path.write_bytes(raw[:size])
        message = refused(read_idx_folder, tmp_path)
        assert message.startswith(f"idx file cannot be read. Received: {str(path)!r} (EOFError: ")
        assert message.endswith(". Download it again.")


def test_damaged_gzip(tmp_path):
    write(tmp_path, *SPELLINGS["gz"])
    path = tmp_path / (NAMES["y_test"] + ".gz")
    raw = bytearray(path.read_bytes())
    raw[-8] ^= 1  # the checksum
    path.write_bytes(raw)
    message = refused(read_idx_folder, tmp_path)
    assert message.startswith(f"idx file cannot be read. Received: {str(path)!r} (BadGzipFile: ")


def test_real_mnist():
    folder = real_data("mnist")
    if folder is None:
        pytest.skip("no MNIST: set KERAS_EMR_TEST_DATA")
    raw = read_idx_folder(folder)
    assert raw["x_train"].shape == (60000, 28, 28)
    data = load(folder)
    assert (data.name, data.image_shape, data.classes) == ("mnist", (28, 28, 1), 10)
    assert [len(data.x_train), len(data.x_val), len(data.x_test)] == [54000, 6000, 10000]
    assert data.x_train.dtype == np.float32
    assert (data.x_train.min(), data.x_train.max()) == (0.0, 1.0)
    counts = np.bincount(data.y_train) + np.bincount(data.y_val)
    assert counts.tolist() == [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    assert raw["y_train"][:5].tolist() == [5, 0, 4, 1, 9]
    assert data.y_test[:5].tolist() == [7, 2, 1, 0, 4]


def test_real_cifar10(tmp_path):
    folder = real_data("cifar10")
    if folder is None:
        pytest.skip("no CIFAR-10: set KERAS_EMR_TEST_DATA")
    image = pytest.importorskip("PIL.Image")

    def mosaic(part):  # 25 x 40 images of 32 x 32 pixels; the first of each part is enough here
        with image.open(folder / f"{part}-00.webp") as picture:
            pixels = np.asarray(picture.convert("RGB"))
        x = pixels.reshape(25, 32, 40, 32, 3).swapaxes(1, 2).reshape(1000, 32, 32, 3)
        y = np.fromfile(folder / f"{part}-labels.u8", np.uint8)[:1000]
        return {f"x_{part}": x, f"y_{part}": y}

    np.savez(tmp_path / "cifar10.npz", **mosaic("train"), **mosaic("test"))
    data = load(tmp_path / "cifar10.npz")
    assert (data.name, data.image_shape, data.classes) == ("cifar10", (32, 32, 3), 10)
    assert [len(data.x_train), len(data.x_val), len(data.x_test)] == [900, 100, 1000]
    assert data.y_test[:5].tolist() == [3, 8, 8, 0, 6]
