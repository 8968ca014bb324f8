"""Small folders of pictures for tests."""

import numpy as np
from PIL import Image

CLASSES = ("ant", "bee")


def picture(seed, shape=(6, 5, 3)):
    """Random pixels, uint8; another image for every seed."""
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def save(path, pixels):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.squeeze()).save(path)


def folder(path, n=(12, 5, 6), shape=(6, 5, 3)):
    """``train|val|test/ant|bee/NUMBER.png``; returns the uint8 arrays by split, files in order."""
    images, seed = {}, 0
    for split, count in zip(("train", "val", "test"), n, strict=True):
        for name in CLASSES:
            for i in range(count):
                pixels = picture(seed, shape)
                seed += 1
                save(path / split / name / f"{i:02}.png", pixels)
                images.setdefault(split, []).append(pixels)
    return {split: np.stack(found) for split, found in images.items()}
