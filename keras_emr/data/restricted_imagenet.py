"""Restricted ImageNet: nine classes, each made of neighbouring classes of an ImageNet folder."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

from keras_emr.data.folder_listing import class_folders
from keras_emr.data.image_folder import open_image_folder
from keras_emr.data.source import Source
from keras_emr.errors import UserError

PREFIX = "restricted-imagenet:"
IMAGENET_CLASSES = 1000
# Class -> first and last ImageNet class, both included; the classes are numbered in the order of
# their WordNet ids. Source: Restricted ImageNet of MadryLab/robustness (commit a954124).
RANGES = {
    "dog": (151, 268),
    "cat": (281, 285),
    "frog": (30, 32),
    "turtle": (33, 37),
    "bird": (80, 100),
    "monkey": (365, 382),
    "fish": (389, 397),
    "crab": (118, 121),
    "insect": (300, 319),
}


def superclasses(wordnet_ids: list[str]) -> dict[str, tuple[str, ...]]:
    """Class -> the ids that make it up, of the 1,000 ids of ImageNet.

    Raises:
        UserError: not 1,000 WordNet ids: a class number would mean another class.
    """
    ids = sorted(i for i in wordnet_ids if re.fullmatch(r"n\d{8}", i))
    if len(ids) != IMAGENET_CLASSES:
        raise UserError(
            f"Restricted ImageNet needs ImageNet's {IMAGENET_CLASSES} class folders, by whose order"
            f" its classes are numbered. Received: {len(ids)} folders named like n01440764."
            " Expected train/n.../, all of them."
        )
    return {name: tuple(ids[first : last + 1]) for name, (first, last) in RANGES.items()}


def open_restricted_imagenet(folder: str | Path, **options) -> Source:
    """The source of an ImageNet folder, ``train/n.../`` and ``val/n.../``.

    ImageNet's validation images are the test set, as in the papers that report on them; validation
    images are taken from the training set.

    Args:
        folder: of ImageNet.
        options: as :func:`keras_emr.data.image_folder.open_image_folder` takes them.

    Raises:
        UserError: as that, and where the 1,000 class folders are not there.
    """
    folder = Path(folder)
    members = superclasses(class_folders(folder))
    source = open_image_folder(folder, superclasses=members, **options)
    parts = dict(source.parts)
    if "test" not in parts and "val" in parts:
        parts["test"] = parts.pop("val")
    return replace(source, name=f"restricted-{source.name}", parts=parts)
