"""Folders of pictures: what is read, how it is divided, and what is refused."""

import shutil

import numpy as np
import pytest
from PIL import Image

from keras_emr.data import load
from keras_emr.data.image_folder import parse_size
from keras_emr.data.pictures import read_picture
from keras_emr.errors import UserError
from tests.data.pictures import folder, picture, save


def message(path, **options):
    with pytest.raises(UserError) as caught:
        load(path, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_pictures_become_the_arrays_that_they_are(tmp_path):
    written = folder(tmp_path / "insects")
    (tmp_path / "insects" / "LICENSE.txt").write_text("mine")
    (tmp_path / "insects" / "train" / "ant" / ".hidden.png").write_text("no picture")
    (tmp_path / "insects" / "train" / "ant" / "notes.txt").write_text("no picture by its name")
    data = load(tmp_path / "insects")
    assert (data.name, data.image_shape, data.classes) == ("insects", (6, 5, 3), 2)
    assert data.class_names == ("ant", "bee")
    assert data.licence == "see LICENSE.txt in the folder"
    for split, (x, y) in data.splits.items():
        np.testing.assert_array_equal(x, (written[split] / 255).astype(np.float32))
        half = len(y) // 2
        np.testing.assert_array_equal(y, [0] * half + [1] * half)
        assert (x.dtype, y.dtype) == (np.float32, np.int32)


def test_a_folder_without_splits_is_divided_by_class_and_seed(tmp_path):
    for i in range(60):
        save(tmp_path / "abc"[i % 3] / f"{i}.png", picture(i, (4, 4)))
    data = load(tmp_path, split_seed=3)
    assert [len(y) for _, y in data.splits.values()] == [43, 5, 12]
    assert data.image_shape == (4, 4, 1)
    np.testing.assert_array_equal(np.bincount(data.y_test), [4, 4, 4])
    everything = np.concatenate([x for x, _ in data.splits.values()])
    assert len({x.tobytes() for x in everything}) == 60
    np.testing.assert_array_equal(data.x_test, load(tmp_path, split_seed=3).x_test)
    assert not np.array_equal(data.x_test, load(tmp_path, split_seed=4).x_test)


def test_copies_of_an_image_stay_on_one_side(tmp_path):
    for i in range(60):
        save(tmp_path / "ab"[i % 2] / f"{i}.png", picture(i // 2 % 2 + i % 2 * 2 + i // 12 * 4))
    for seed in range(5):
        data = load(tmp_path, split_seed=seed, validation=0.2)
        sides = [{image.tobytes() for image in x} for x, _ in data.splits.values()]
        assert sum(map(len, sides)) == len(set.union(*sides)) == 20
        assert sum(len(y) for _, y in data.splits.values()) == 60


def test_train_and_test_folders_give_validation_images_from_train(tmp_path):
    written = folder(tmp_path)
    shutil.rmtree(tmp_path / "val")
    data = load(tmp_path, validation=0.25)
    assert [len(y) for _, y in data.splits.values()] == [18, 6, 12]
    np.testing.assert_array_equal(data.x_test, (written["test"] / 255).astype(np.float32))


def test_other_names_of_splits(tmp_path):
    folder(tmp_path)
    (tmp_path / "train").rename(tmp_path / "Training")
    (tmp_path / "val").rename(tmp_path / "validation")
    assert [len(y) for _, y in load(tmp_path).splits.values()] == [24, 10, 12]


def test_sizes(tmp_path):
    folder(tmp_path)
    odd = tmp_path / "train" / "bee" / "odd.png"
    save(odd, picture(99, (9, 7, 3)))
    assert message(tmp_path) == (
        f"images differ in size. Received: 2 sizes (6x5, 9x7) in {str(tmp_path)!r}. Expected one"
        " size, or --image-size HxW to resize to, such as --image-size 6x5."
    )
    data = load(tmp_path, image_size="3x4")
    assert data.image_shape == (3, 4, 3)
    with Image.open(odd) as image:  # at the end of its class, which is the last
        expected = np.asarray(image.resize((4, 3), Image.Resampling.BILINEAR)) / 255
    np.testing.assert_array_equal(data.x_train[-1], expected.astype(np.float32))


@pytest.mark.parametrize("size", ["32", "0x4", "axb", "4x-2", (3,), 7, "99999x4"])
def test_bad_size(size):
    with pytest.raises(UserError, match="image_size: bad value"):
        parse_size(size)


def test_kinds_of_pictures(tmp_path):
    grey = picture(1, (6, 5))
    deep = tmp_path / "deep.png"
    Image.fromarray(grey.astype(np.uint16) * 257).save(deep)
    np.testing.assert_array_equal(read_picture(deep, (6, 5, 1))[..., 0], grey)

    colours = picture(2, (6, 5, 4))
    save(tmp_path / "rgba.png", colours)
    np.testing.assert_array_equal(read_picture(tmp_path / "rgba.png", (6, 5, 3)), colours[..., :3])
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned a quarter clockwise
    Image.fromarray(colours[..., :3]).save(tmp_path / "turned.png", exif=exif)
    np.testing.assert_array_equal(
        read_picture(tmp_path / "turned.png", (5, 6, 3)), np.rot90(colours[..., :3], -1)
    )
    Image.fromarray(grey.astype(np.float32)).save(tmp_path / "float.tiff")
    with pytest.raises(UserError, match=r"floating-point pixels. Received: .*float.tiff"):
        read_picture(tmp_path / "float.tiff", (6, 5, 1))


def unreadable(path):
    (path / "train" / "ant" / "03.png").write_text("hello")
    return "image cannot be read: not a picture.", "03.png"


def truncated(path):
    file = path / "test" / "bee" / "04.png"
    file.write_bytes(file.read_bytes()[:90])
    return "image cannot be read: ", "04.png"


def grey_among_rgb(path):
    save(path / "val" / "bee" / "01.png", picture(500, (6, 5)))
    return "grey image among 45 RGB images.", "01.png"


def overlap(path):
    shutil.copy(path / "test" / "ant" / "02.png", path / "train" / "ant" / "00.png")
    return "splits overlap: the same image in train and elsewhere.", "ant/00.png"


@pytest.mark.parametrize("spoil", [unreadable, truncated, grey_among_rgb, overlap])
@pytest.mark.parametrize("stream", ["never", "always"])
def test_a_bad_image_is_named_or_skipped_and_counted(tmp_path, spoil, stream):
    folder(tmp_path)
    good = load(tmp_path)
    what, name = spoil(tmp_path)
    said = message(tmp_path, stream=stream)
    assert said.startswith(what) and name in said and "--skip-bad" in said
    data = load(tmp_path, skip_bad=True, stream=stream)
    assert len(data.skipped) == 1 and name in data.skipped[0] and what[:20] in data.skipped[0]
    lost = sum(len(y) for _, y in good.splits.values()) - sum(
        len(y) for _, y in data.splits.values()
    )
    assert lost == 1
    assert data.fingerprint != good.fingerprint


def test_rgb_among_grey(tmp_path):
    folder(tmp_path, shape=(6, 5))
    save(tmp_path / "train" / "bee" / "zz.png", picture(700))
    assert message(tmp_path).startswith("RGB image among 46 grey images. Received: ")


def test_an_empty_class_folder(tmp_path):
    folder(tmp_path)
    (tmp_path / "train" / "cat").mkdir()
    assert message(tmp_path).startswith(
        f"class folder is empty. Received: no picture in {str(tmp_path / 'train' / 'cat')!r}."
    )
    (tmp_path / "train" / "cat" / "1.png").write_text("")
    assert message(tmp_path, skip_bad=True).startswith(
        "class folder is empty once bad images are left out. Received: 'cat'"
    )


def test_folders_that_are_not_clear(tmp_path):
    folder(tmp_path / "a")
    (tmp_path / "a" / "other").mkdir()
    assert message(tmp_path / "a").startswith("image folder: splits are not clear. Received: other")
    folder(tmp_path / "b")
    shutil.rmtree(tmp_path / "b" / "train")
    assert message(tmp_path / "b").startswith("image folder: splits are not clear. Received: test")
    folder(tmp_path / "c")
    (tmp_path / "c" / "train" / "bee").rename(tmp_path / "c" / "train" / "wasp")
    assert message(tmp_path / "c").startswith(
        "class without training images. Received: 'bee' in val"
    )
    folder(tmp_path / "d")
    (tmp_path / "d" / "valid").mkdir()
    assert message(tmp_path / "d").startswith("two folders for one split. Received: 'val' and")
    save(tmp_path / "e" / "1.png", picture(0))
    assert message(tmp_path / "e").startswith("image folder without class folders. Received: ")
    save(tmp_path / "f" / "one" / "1.png", picture(0))
    assert message(tmp_path / "f").startswith("image folder with a single class. Received: only")


def test_too_few_to_divide(tmp_path):
    for name in "ab":
        save(tmp_path / name / "1.png", picture(ord(name)))
    assert message(tmp_path).startswith("too few training images to take a test set from.")


def test_options_that_mean_nothing_elsewhere(tmp_path):
    assert message("digits", image_size="4x4").startswith(
        "image_size: only for folders of pictures and TFDS. Received: '4x4' with 'digits'"
    )
    assert message("digits", skip_bad=True).startswith("skip_bad: only for folders of pictures.")
    assert message("digits", stream="always").startswith("stream: only for folders")
    assert "did you mean 'always'" in message("digits", stream="alway")
    assert load("digits", stream="never").streamed is False
