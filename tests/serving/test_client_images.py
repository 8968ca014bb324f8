"""Image files of every mode and size become what the model takes."""

import tracemalloc
import zlib

import numpy as np
import pytest
from PIL import Image

from keras_emr.errors import UserError
from keras_emr_serving.client.images import read_images
from keras_emr_serving.client.resize import resize

RNG = np.random.default_rng(1)
GREY = RNG.integers(0, 256, (6, 5), "uint8")
COLOUR = RNG.integers(0, 256, (6, 5, 3), "uint8")
LUMA = np.array([0.299, 0.587, 0.114])


def read(path, shape):
    ((index, image),) = read_images(path, shape)
    assert index is None
    assert image.dtype == np.float32 and image.min() >= 0 and image.max() <= 1
    return image


def saved(tmp_path, image, name="x.png", **options):
    image.save(tmp_path / name, **options)
    return tmp_path / name


def test_the_pixels_of_a_picture_of_the_models_size(tmp_path):
    grey, colour = Image.fromarray(GREY), Image.fromarray(COLOUR)
    np.testing.assert_array_equal(
        read(saved(tmp_path, grey), (6, 5, 1)), (GREY / np.float32(255))[..., None]
    )
    np.testing.assert_array_equal(
        read(saved(tmp_path, colour), (6, 5, 3)), COLOUR / np.float32(255)
    )
    assert read(saved(tmp_path, colour), (None, None, 3)).shape == (6, 5, 3)


def modes():
    grey, colour = Image.fromarray(GREY), Image.fromarray(COLOUR)
    alpha = Image.fromarray(RNG.integers(0, 256, (6, 5), "uint8"))
    rgba, la = colour.copy(), grey.copy()
    rgba.putalpha(alpha)
    la.putalpha(alpha)
    few = COLOUR // 64 * 64
    palette = Image.fromarray(few).convert("P", palette=Image.Palette.ADAPTIVE, colors=256)
    deep = GREY.astype("uint16") * 257 + 3
    binary = GREY > 127
    real = (GREY / 255).astype("float32")
    repeated = GREY[..., None] / 255
    yield "L.png", grey, repeated, 1e-6
    yield "LA.png", la, repeated, 1e-6
    yield "RGB.png", colour, COLOUR / 255, 1e-6
    yield "RGBA.png", rgba, COLOUR / 255, 1e-6
    yield "P.png", palette, few / 255, 1e-6
    yield "P.gif", palette, few / 255, 1e-6
    yield "1.png", Image.fromarray(binary), binary[..., None], 1e-6
    yield "I16.png", Image.fromarray(np.minimum(deep, 65535)), deep[..., None] / 65535, 2e-4
    yield "I.tiff", Image.fromarray(GREY.astype("int32") * 257), repeated, 1e-6
    yield "F.tiff", Image.fromarray(real), real[..., None], 1e-6
    yield "CMYK.tiff", colour.convert("CMYK"), COLOUR / 255, 2 / 255
    yield "YCbCr.tiff", colour.convert("YCbCr"), COLOUR / 255, 4 / 255
    yield "RGB.webp", colour, COLOUR / 255, 1e-6
    yield "L.bmp", grey, repeated, 1e-6
    yield "L.pgm", grey, repeated, 1e-6


@pytest.mark.parametrize(
    ("name", "image", "wanted", "error"), list(modes()), ids=lambda v: str(v)[:12]
)
def test_every_mode(tmp_path, name, image, wanted, error):
    options = {"lossless": True, "exact": True} if name.endswith("webp") else {}
    path = saved(tmp_path, image, name, **options)
    colour = np.broadcast_to(wanted, (6, 5, 3))
    np.testing.assert_allclose(read(path, (6, 5, 3)), colour, atol=error)
    # Pillow rounds the grey of colours to whole bytes.
    grey = wanted if wanted.shape[-1] == 1 else (colour @ LUMA)[..., None]
    np.testing.assert_allclose(read(path, (6, 5, 1)), grey, atol=error + 1 / 255)


def test_transparency_only_where_the_model_takes_it(tmp_path):
    rgba = RNG.integers(0, 256, (6, 5, 4), "uint8")
    path = saved(tmp_path, Image.fromarray(rgba))
    np.testing.assert_array_equal(read(path, (6, 5, 4)), rgba / np.float32(255))
    np.testing.assert_array_equal(read(path, (6, 5, 3)), rgba[..., :3] / np.float32(255))
    opaque = read(saved(tmp_path, Image.fromarray(GREY)), (6, 5, 4))
    np.testing.assert_array_equal(opaque[..., 3], 1)
    deep = read(saved(tmp_path, Image.fromarray(GREY.astype("uint16") * 257)), (6, 5, 4))
    np.testing.assert_allclose(deep, opaque, atol=1e-6)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_are_turned_as_the_camera_was(tmp_path, orientation):
    turned = {
        1: GREY,
        2: GREY[:, ::-1],
        3: GREY[::-1, ::-1],
        4: GREY[::-1],
        5: GREY.T,
        6: np.rot90(GREY, -1),
        7: GREY[::-1, ::-1].T,
        8: np.rot90(GREY),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = saved(tmp_path, Image.fromarray(GREY), exif=exif)
    found = read(path, (*turned.shape, 1))
    np.testing.assert_array_equal(found[..., 0], turned / np.float32(255))


@pytest.mark.parametrize(
    ("size", "wanted"),
    [
        ((7, 9), (3, 4)),
        ((64, 48), (28, 28)),
        ((5, 5), (28, 28)),
        ((600, 301), (8, 8)),  # more rows than are worked on at a time
        ((10, 20), (20, 10)),
        ((28, 28), (28, 28)),
        ((1, 1), (8, 8)),
    ],
)
def test_resizing_is_that_of_training(size, wanted):
    import tensorflow as tf

    image = RNG.integers(0, 256, (*size, 3), "uint8")
    there = tf.image.resize(image / np.float32(255), wanted, antialias=True).numpy()
    here = resize(image, wanted)
    assert here.dtype == np.float32
    np.testing.assert_allclose(here, np.clip(there, 0, 1), atol=2e-6)


def test_resizing_worked_out_by_hand():
    image = np.array([[0, 255, 0, 255]], "uint8")[..., None]
    # Each new pixel: a triangle over the three or four old ones that it touches.
    left = (3 * 0 + 3 * 1 + 1 * 0) / 7
    np.testing.assert_allclose(resize(image, (1, 2))[0, :, 0], [left, 4 / 7], atol=1e-6)


def test_arrays_are_taken_as_they_are(tmp_path):
    images = RNG.uniform(0, 1, (4, 6, 5, 1)).astype("float32")
    np.save(tmp_path / "four.npy", images)
    np.save(tmp_path / "flat.npy", images[..., 0])
    np.save(tmp_path / "one.npy", images[2])
    np.save(tmp_path / "bare.npy", images[2, ..., 0])
    np.savez(tmp_path / "data.npz", x_train=images[:1], x_test=images, y_test=np.arange(4))
    np.savez(tmp_path / "any.npz", whatever=(images * 255).astype("uint8"))
    for name in ("four.npy", "flat.npy", "data.npz"):
        found = read_images(tmp_path / name, (6, 5, 1))
        assert [index for index, _ in found] == [0, 1, 2, 3]
        np.testing.assert_array_equal(np.stack([image for _, image in found]), images)
    for name in ("one.npy", "bare.npy"):
        np.testing.assert_array_equal(read(tmp_path / name, (6, 5, 1)), images[2])
    found = read_images(tmp_path / "any.npz", (None, None, 1))
    np.testing.assert_allclose(found[3][1], images[3], atol=1 / 255)


def refused(path, *texts, shape=(6, 5, 1)):
    with pytest.raises(UserError) as raised:
        read_images(path, shape)
    for text in (*texts, repr(str(path)) if path.suffix != ".npy" else "."):
        assert text in str(raised.value)
    assert "\n" not in str(raised.value)


def test_files_that_are_no_images(tmp_path):
    refused(tmp_path / "none.png", "no such file")
    refused(tmp_path, "is a folder")
    for name in ("empty.png", "empty.npy", "empty.npz"):
        (tmp_path / name).write_bytes(b"")
        refused(tmp_path / name, "cannot be read")
    (tmp_path / "text.jpg").write_text("hello " * 100)
    refused(tmp_path / "text.jpg", "cannot be read: not an image.")
    saved(tmp_path, Image.fromarray(COLOUR).resize((100, 100)), "cut.png")
    whole = (tmp_path / "cut.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    refused(tmp_path / "cut.png", "cannot be read: ")
    far = Image.fromarray(np.full((6, 5), 70_000, "int32"))
    refused(saved(tmp_path, far, "far.tiff"), "at most 16 bits")
    far = Image.fromarray(np.full((6, 5), np.nan, "float32"))
    refused(saved(tmp_path, far, "nan.tiff"), "values in [0, 1]")
    refused(saved(tmp_path, Image.fromarray(GREY)), "takes 7 channels", shape=(6, 5, 7))


def png(width, height):
    """A small file that says that it holds a large picture."""

    def chunk(kind, content):
        check = zlib.crc32(kind + content).to_bytes(4)
        return len(content).to_bytes(4) + kind + content + check

    header = width.to_bytes(4) + height.to_bytes(4) + bytes([8, 0, 0, 0, 0])
    content = zlib.compress(b"\0" * 1000)
    parts = chunk(b"IHDR", header) + chunk(b"IDAT", content) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + parts


@pytest.mark.parametrize(
    "sides", [(10_000, 10_000), (100_000, 100_000), (40_000_000, 1), (1, 65_536)]
)
def test_bombs(tmp_path, sides):
    """Of pixels, or of sides: to make 8 pixels of 40 million took 9 GB."""
    (tmp_path / "bomb.png").write_bytes(png(*sides))
    expected = "Expected at most 89478485 pixels, and 65535 on a side."
    refused(tmp_path / "bomb.png", "too large to be unpacked", expected)


def test_a_long_picture_of_a_free_side_needs_little(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (20_000, 10), "uint8")
    Image.fromarray(pixels).save(tmp_path / "long.png")
    tracemalloc.start()
    try:
        for shape in ((None, None, 1), (None, 10, 1), (None, 5, 1)):
            ((_, image),) = read_images(tmp_path / "long.png", shape)
            assert image.shape == (20_000, shape[1] or 10, 1)
            if shape[1] != 5:
                np.testing.assert_array_equal(image[..., 0], pixels.astype("float32") / 255)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 20e6  # the square of the length would be 1.6 GB


def test_arrays_that_are_no_images(tmp_path):
    np.save(tmp_path / "x.npy", np.zeros((2, 7, 5, 1), "float32"))
    refused(tmp_path / "x.npy", "x.npy: the model takes other images", "(2, 7, 5, 1)")
    np.save(tmp_path / "x.npy", np.zeros((2, 6, 5, 1), "int64"))
    refused(tmp_path / "x.npy", "dtype int64")
    np.save(tmp_path / "x.npy", np.array([{}], dtype=object), allow_pickle=True)
    refused(tmp_path / "x.npy", "cannot be read")
    header = (tmp_path / "h.npy").open("wb")
    huge = {"descr": "<f4", "fortran_order": False, "shape": (10**6, 10**6)}
    np.lib.format.write_array_header_1_0(header, huge)
    header.close()
    refused(tmp_path / "h.npy", "cannot be read")
    np.savez(tmp_path / "x.npz", a=np.zeros(1), b=np.zeros(1))
    refused(tmp_path / "x.npz", "several arrays: a, b", "x_test, x, images")
