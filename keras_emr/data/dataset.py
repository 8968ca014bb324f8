"""A data set: checked arrays for training, validation and test."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from keras_emr.data.checks import check_arrays, to_unit_float
from keras_emr.data.split import check_fraction, stratified_split
from keras_emr.errors import UserError

NO_LICENCE = "not stated by the source"


@dataclass(frozen=True, eq=False, repr=False)
class Dataset:
    """Images and labels, ready to train on.

    What is too large for memory comes as :class:`keras_emr.data.stored.StoredImages`: the same
    float32 images, read when they are indexed.

    Attributes:
        name: what reports call it.
        x_train, x_val, x_test: float32 images (N, H, W, C) in [0, 1].
        y_train, y_val, y_test: int32 labels (N,) in [0, classes).
        classes: the number of classes K.
        class_names: K names, in label order.
        fingerprint: SHA-256 (hex) of the arrays as they came from the source, before they were
            split and scaled: it names the data, whatever the split.
        licence: what the source says of its licence.
        skipped: what was left out as unusable, a line each.
    """

    name: str
    x_train: np.ndarray
    y_train: np.ndarray
    x_val: np.ndarray
    y_val: np.ndarray
    x_test: np.ndarray
    y_test: np.ndarray
    classes: int
    class_names: tuple[str, ...]
    fingerprint: str
    licence: str = NO_LICENCE
    skipped: tuple[str, ...] = ()

    @property
    def splits(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """``{"train": (x, y), "val": ..., "test": ...}``."""
        return {p: (getattr(self, f"x_{p}"), getattr(self, f"y_{p}")) for p in _SPLITS}

    @property
    def streamed(self) -> bool:
        """Whether the training images stay on disk."""
        return not isinstance(self.x_train, np.ndarray)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(H, W, C)."""
        return self.x_train.shape[1:]

    def __repr__(self) -> str:
        sizes = f"{len(self.x_train)} train, {len(self.x_val)} val, {len(self.x_test)} test"
        return f"Dataset({self.name!r}: {sizes}; {self.image_shape}, {self.classes} classes)"


def fingerprint(arrays: Mapping[str, np.ndarray]) -> str:
    """SHA-256 (hex) of the name, shape, dtype and bytes of every array, in the order given."""
    digest = hashlib.sha256()
    for name, array in arrays.items():
        array = np.ascontiguousarray(array)
        digest.update(f"{name} {array.shape} {array.dtype.str};".encode())
        digest.update(array.reshape(-1).view(np.uint8))
    return digest.hexdigest()


def from_arrays(
    arrays: Mapping[str, np.ndarray],
    *,
    name: str = "arrays",
    split_seed: int = 0,
    validation: float = 0.1,
    source: Mapping[str, np.ndarray] | None = None,
    licence: str = NO_LICENCE,
) -> Dataset:
    """Check arrays and make a :class:`Dataset` of them.

    Args:
        arrays: ``x_train, y_train, x_test, y_test`` and optionally ``x_val, y_val``: images
            (N, H, W, C) or (N, H, W), uint8 (divided by 255) or float in [0, 1]; integer labels
            (N,). Other names are ignored.
        name: what reports call it.
        split_seed: decides which training examples become the validation set.
        validation: without ``x_val``, the share of the training set taken for it, in (0, 1),
            class-stratified. The test set is never touched.
        source: what to take the fingerprint of, when not of ``arrays``.
        licence: what the source says of its licence.

    Returns:
        The data set. float32 images given with their own validation set are not copied.

    Raises:
        UserError: an array is missing, malformed or out of range, or there are too few training
            examples for a validation set.
    """
    check_fraction("validation", validation)
    arrays = {key: np.asarray(arrays[key]) for key in _FIELDS if key in arrays}
    checked, classes = check_arrays(arrays)
    if "x_val" not in checked:
        x, y = checked["x_train"], checked["y_train"]
        kept, taken = stratified_split(y, validation, split_seed)
        if len(taken) == 0:
            raise UserError(
                "x_train: too few images to take a validation set from."
                f" Received: {len(x)} images, {classes} classes, validation={validation}."
                " Give x_val and y_val, more images, or a larger fraction."
            )
        # Split before scaling: uint8 is a quarter of the memory.
        checked.update(x_train=x[kept], y_train=y[kept], x_val=x[taken], y_val=y[taken])
    for key in ("x_train", "x_val", "x_test"):
        checked[key] = to_unit_float(checked[key])
    return Dataset(
        name=name,
        **checked,
        classes=classes,
        class_names=tuple(str(label) for label in range(classes)),
        fingerprint=fingerprint(arrays if source is None else source),
        licence=licence,
    )


_SPLITS = ("train", "val", "test")
_FIELDS = ("x_train", "y_train", "x_val", "y_val", "x_test", "y_test")
