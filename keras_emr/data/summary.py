"""What a data set holds: counts, range, copies across splits, and a picture of samples."""

from __future__ import annotations

from itertools import combinations

import numpy as np

from keras_emr.data.dataset import Dataset
from keras_emr.data.source import digest_of

_CHUNK = 256
_CLASSES_SHOWN = 20
_GAP = 1  # pixels between samples


def summarize(data: Dataset) -> dict:
    """Facts of a data set, ready for JSON; every image is looked at.

    Returns:
        ``name, image_shape, classes, range`` (smallest and largest pixel, in [0, 1]), ``licence,
        sha256, streamed, skipped`` (a line for each image left out), ``splits`` (``images``, and
        ``per_class``: images of each class, by its name) and ``duplicates``: images of a split
        whose pixels it has more than once (``train``), and images of the first that stand in the
        second as well (``train in test``).
    """
    seen = {split: _digests(x) for split, (x, _) in data.splits.items()}
    duplicates = {split: len(found) - len(set(found)) for split, found in seen.items()}
    for first, second in combinations(seen, 2):
        there = set(seen[second])
        duplicates[f"{first} in {second}"] = sum(digest in there for digest in seen[first])
    splits = {}
    for split, (x, y) in data.splits.items():
        counts = np.bincount(y, minlength=data.classes).tolist()
        splits[split] = {
            "images": len(x),
            "per_class": list(map(list, zip(data.class_names, counts, strict=True))),
        }
    images = [x for x, _ in data.splits.values()]
    return {
        "name": data.name,
        "image_shape": list(data.image_shape),
        "classes": data.classes,
        "range": [float(min(x.min() for x in images)), float(max(x.max() for x in images))],
        "licence": data.licence,
        "sha256": data.fingerprint,
        "streamed": data.streamed,
        "skipped": list(data.skipped),
        "splits": splits,
        "duplicates": duplicates,
    }


def _digests(x) -> list[bytes]:
    chunks = (x[start : start + _CHUNK] for start in range(0, len(x), _CHUNK))
    return [digest_of(image).tobytes() for chunk in chunks for image in chunk]


def samples_figure(data: Dataset, columns: int = 10):
    """The first training images of each class, a row per class, in equal steps of pixels.

    Args:
        columns: images of a class.

    Returns:
        ``matplotlib.figure.Figure``; beyond 20 classes the first 20.
    """
    from keras_emr.evaluation.plots import blank_figure

    shown = min(data.classes, _CLASSES_SHOWN)
    height, width, channels = data.image_shape
    rows, cell = (height + _GAP), (width + _GAP)
    canvas = np.ones((shown * rows - _GAP, columns * cell - _GAP, channels), np.float32)
    for label in range(shown):
        for column, i in enumerate(np.flatnonzero(data.y_train == label)[:columns]):
            top, left = label * rows, column * cell
            canvas[top : top + height, left : left + width] = data.x_train[int(i)]
    inches = 0.55
    figure = blank_figure(columns * inches * min(width / height, 3) + 2, shown * inches + 0.7)
    axis = figure.subplots()
    axis.imshow(
        canvas.squeeze(-1) if channels == 1 else canvas, cmap="gray", vmin=0, vmax=1,
        interpolation="nearest",
    )  # fmt: skip
    axis.set_yticks([label * rows + height / 2 - 0.5 for label in range(shown)])
    axis.set_yticklabels([_short(name) for name in data.class_names[:shown]], fontsize=9)
    axis.set_xticks([])
    axis.tick_params(length=0)
    for spine in axis.spines.values():
        spine.set_visible(False)
    sides = "x".join(map(str, data.image_shape))
    of_all = f"{shown} of {data.classes}" if shown < data.classes else f"{data.classes}"
    axis.set_title(f"{data.name}: training images {sides}, {of_all} classes", fontsize=10)
    return figure


def _short(name: str) -> str:
    return name if len(name) <= 24 else name[:23] + "…"
