"""scikit-learn's handwritten digits: small, and on disk wherever scikit-learn is installed."""

from __future__ import annotations

import numpy as np

from keras_emr.data.dataset import Dataset, from_arrays
from keras_emr.data.split import check_fraction, stratified_split

IMAGES = 1797
LICENCE = "UCI Optical Recognition of Handwritten Digits, CC BY 4.0"
TEST_IMAGES = 360  # 20 %, rounded up as scikit-learn's train_test_split does


def load_digits_arrays() -> tuple[np.ndarray, np.ndarray]:
    """The 1,797 images in scikit-learn's order.

    Returns:
        ``(x, y)``: float32 images (1797, 8, 8, 1) in [0, 1] (multiples of 1/16, exact) and int32
        labels (1797,), 0 to 9.
    """
    from sklearn.datasets import load_digits  # takes a second: only when the data is wanted

    digits = load_digits()
    x = (digits.images / 16).astype(np.float32)[..., np.newaxis]
    return x, digits.target.astype(np.int32)


def load_split_digits(split_seed: int = 0, validation: float = 0.1) -> Dataset:
    """The digits in three class-stratified parts: 1,257 train, 180 validation, 360 test.

    Args:
        split_seed: decides both the test set and the validation set.
        validation: share of all 1,797 images (not of the training set), in (0, 0.8).

    Returns:
        The data set.

    Raises:
        UserError: validation out of range.
    """
    check_fraction("validation", validation, below=0.8)  # 20 % are the test set
    x, y = load_digits_arrays()
    rest, test = stratified_split(y, TEST_IMAGES / IMAGES, split_seed)
    return from_arrays(
        {"x_train": x[rest], "y_train": y[rest], "x_test": x[test], "y_test": y[test]},
        name="digits",
        split_seed=split_seed,
        validation=round(validation * IMAGES) / len(rest),
        source={"x": x, "y": y},
        licence=LICENCE,
    )
