"""Check the arrays a user brings, before anything is trained on them."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from keras_emr.errors import UserError

# Far above any data set of images; labels beyond it are identifiers, not class numbers.
MAX_CLASSES = 100_000


def check_images(field: str, x) -> np.ndarray:
    """Check images and give them a channel axis; values and dtype stay as they are.

    Args:
        field: what messages call the array, e.g. ``x_train``.
        x: (N, H, W, C) or (N, H, W); uint8, or float in [0, 1].

    Returns:
        The same array as (N, H, W, C), a view where possible.

    Raises:
        UserError: wrong rank, empty, wrong dtype, not finite, or outside [0, 1].
    """
    x = np.asarray(x)
    _refuse_objects(field, x)
    if x.ndim not in (3, 4):
        raise UserError(
            f"{field}: images must be (N, H, W, C) or (N, H, W). Received: shape {x.shape}."
            " Reshape them."
        )
    if x.size == 0:
        raise UserError(
            f"{field}: no images. Received: shape {x.shape}. At least one image is needed."
        )
    if x.dtype.kind == "f":
        check_range(field, x, bytes_fix="Divide by 255 first, or store uint8.")
    elif x.dtype != np.uint8:
        raise UserError(
            f"{field}: images must be uint8 in [0, 255] or float in [0, 1]."
            f" Received: dtype {x.dtype}. Convert them with astype, e.g. x.astype('uint8')."
        )
    return x[..., np.newaxis] if x.ndim == 3 else x


def check_labels(
    field: str, y, count: int, classes: int | None = None, classes_of: str = "y_train"
) -> np.ndarray:
    """Check the labels of ``count`` images.

    Args:
        field: what messages call the array, e.g. ``y_train``.
        y: integer labels (N,), numbered from 0.
        count: the number of images that they belong to.
        classes: the number of classes K, when it is known: labels must be below it.
        classes_of: what K is the number of classes of, for the message.

    Returns:
        int32 labels (N,).

    Raises:
        UserError: wrong rank, dtype, length or value.
    """
    y = np.asarray(y)
    _refuse_objects(field, y)
    if y.ndim != 1:
        raise UserError(
            f"{field}: labels must be one-dimensional. Received: shape {y.shape}."
            " Flatten a column with y.reshape(-1), turn one-hot rows into labels with y.argmax(1)."
        )
    if y.dtype.kind not in "iu":
        raise UserError(
            f"{field}: labels must be integers. Received: dtype {y.dtype}."
            " Number the classes from 0 and store an integer dtype."
        )
    if len(y) != count:
        raise UserError(
            f"{field}: one label for each image is needed."
            f" Received: {len(y)} labels for {count} images. Make the lengths equal."
        )
    if y.min() < 0:
        raise UserError(
            f"{field}: labels must not be negative. Received: label {y.min()}."
            " Number the classes from 0."
        )
    if y.max() >= (classes or MAX_CLASSES):
        limit = (
            f"K={classes} classes in {classes_of}" if classes else f"at most {MAX_CLASSES} classes"
        )
        raise UserError(
            f"{field}: labels must be below the number of classes."
            f" Received: label {y.max()}, with {limit}. Number the classes from 0, the same way"
            " in every array."
        )
    return y.astype(np.int32)


def check_arrays(arrays: Mapping[str, np.ndarray]) -> tuple[dict[str, np.ndarray], int]:
    """Check a whole data set: each array, and that they fit together.

    Args:
        arrays: ``x_train, y_train, x_test, y_test`` and optionally ``x_val, y_val``.

    Returns:
        ``(checked, K)``: images (N, H, W, C) in their own dtype and int32 labels, under the same
        names, and the number of classes, ``max(y_train) + 1``.

    Raises:
        UserError: see :func:`check_images` and :func:`check_labels`; also an array is missing,
            image shapes differ, or there is a single class.
    """
    missing = [
        f"{a}_{part}" for part in _parts(arrays) for a in "xy" if f"{a}_{part}" not in arrays
    ]
    if missing:
        raise UserError(
            f"data arrays are missing: {', '.join(missing)}."
            f" Received: {', '.join(arrays) or 'none'}."
            " Expected x_train, y_train, x_test, y_test, and x_val with y_val or neither."
        )
    checked: dict[str, np.ndarray] = {}
    classes = None
    for part in _parts(arrays):
        x = check_images(f"x_{part}", arrays[f"x_{part}"])
        y = check_labels(f"y_{part}", arrays[f"y_{part}"], len(x), classes)
        if part == "train":
            shape, classes = x.shape[1:], int(y.max()) + 1
        elif x.shape[1:] != shape:
            raise UserError(
                f"x_{part}: images must have the shape of those in x_train."
                f" Received: {x.shape[1:]}, x_train has {shape}. Resize or convert them."
            )
        checked[f"x_{part}"], checked[f"y_{part}"] = x, y
    if classes < 2:
        raise UserError(
            "y_train: at least two classes are needed. Received: only label 0."
            " Check that the labels were read from the right column."
        )
    return checked, classes


def check_range(field: str, x: np.ndarray, bytes_fix: str = "Divide by 255 first.") -> None:
    """Raise :class:`UserError` unless every pixel is finite and in [0, 1].

    Args:
        field: what messages call the array.
        x: float images, at least one.
        bytes_fix: the advice where the values look like bytes.
    """
    low, high = x.min(), x.max()  # NaN shows in both, so the usual case makes no temporary
    if not (np.isfinite(low) and np.isfinite(high)):
        raise UserError(
            f"{field}: images must be finite. Received: {np.isnan(x).sum()} NaN and"
            f" {np.isinf(x).sum()} Inf values. Repair or remove those images."
        )
    if low < 0 or high > 1:
        shown = [str(value).removesuffix(".0") for value in (low, high)]
        # Up to 16 it is not a byte: standardised values, or the raw 0..16 of scikit-learn's digits.
        fix = (
            bytes_fix
            if 16 < high <= 255
            else "Rescale to [0, 1] first; normalisation belongs inside the model."
        )
        raise UserError(
            f"{field}: images must lie in [0, 1]. Received: min={shown[0]}, max={shown[1]}. {fix}"
        )


def to_unit_float(x: np.ndarray) -> np.ndarray:
    """Checked images as float32 in [0, 1]: uint8 is divided by 255, float32 is not copied."""
    if x.dtype == np.uint8:
        return np.divide(x, np.float32(255), dtype=np.float32)
    return x.astype(np.float32, copy=False)


def _parts(arrays: Mapping[str, np.ndarray]) -> list[str]:
    # Training comes first: the others are compared with it.
    return ["train", *(["val"] if "x_val" in arrays or "y_val" in arrays else []), "test"]


def _refuse_objects(field: str, array: np.ndarray) -> None:
    if array.dtype.hasobject:
        raise UserError(
            f"{field}: a plain numeric array is needed. Received: dtype {array.dtype}."
            " Ragged lists give this: make all images the same size and stack them."
        )
