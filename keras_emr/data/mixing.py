"""Training images mixed in pairs, and the shares of the classes that become of their labels."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.special import betaincinv

from keras_emr.data.order import random_words
from keras_emr.errors import UserError

# Step s of a run draws from stream MIXING_STREAM + s: beyond those of augmentation.
MIXING_STREAM = 2**63 + 2**62 + 2**61


@dataclass(frozen=True)
class Mixing:
    """Mixup and cutmix of whole batches; which one, if both are asked for, is drawn evenly.

    Every image ``i`` of a batch meets a partner ``j``, by a permutation of the batch, at a share
    ``l ~ Beta(alpha, alpha)`` that the batch has in common:

    * mixup (Zhang et al., ICLR 2018): ``l x_i + (1 - l) x_j``;
    * cutmix (Yun et al., ICCV 2019): ``x_i`` with a box of ``x_j``, whose centre is uniform and
      whose sides are ``sqrt(1 - l)`` of the image's; what the border cuts off counts for ``l``.

    The label becomes ``l`` of its own class and ``1 - l`` of the partner's.

    Args:
        classes: number of classes K.
        mixup, cutmix: alpha, >= 0; 0: never. The authors use 1 on CIFAR-10, mixup 0.2 on ImageNet.

    Raises:
        UserError: no such alpha, or none at all.
    """

    classes: int
    mixup: float = 0.0
    cutmix: float = 0.0

    def __post_init__(self):
        for name in ("mixup", "cutmix"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not value >= 0:
                raise UserError(f"{name} must be a number >= 0. Received: {value!r}.")
        if not self.mixup + self.cutmix:
            raise UserError("mixing: nothing to do. Received: mixup=0, cutmix=0. Give an alpha.")

    def __call__(self, x: np.ndarray, y: np.ndarray, seed: int, step: int):
        """``(x, y)`` of a batch: images as they came in, float32 shares (N, K).

        Args:
            x: images (N, H, W, C), float.
            y: labels (N,).
            seed, step: the random numbers are fixed by them, whatever came before.
        """
        words = random_words(4 + len(x), seed, MIXING_STREAM + step)
        which, level, *centre = (words[:4] >> np.uint64(11)) * 2.0**-53
        partner = np.argsort(words[4:], kind="stable")
        cut = self.cutmix > 0 and (not self.mixup or which < 0.5)
        alpha = self.cutmix if cut else self.mixup
        share = float(betaincinv(alpha, alpha, level))
        if cut:
            rows, columns = _box(x.shape[1:3], share, centre)
            mixed = x.copy()
            mixed[:, rows, columns] = x[partner][:, rows, columns]
            lost = (rows.stop - rows.start) * (columns.stop - columns.start)
            share = 1.0 - lost / (x.shape[1] * x.shape[2])
        else:
            mixed = (share * x + (1.0 - share) * x[partner]).astype(x.dtype)
        own = np.eye(self.classes, dtype=np.float32)[y]
        return mixed, np.float32(share) * own + np.float32(1.0 - share) * own[partner]


def _box(sides, share, centre):
    """Rows and columns of the box: slices within an image of these sides."""
    slices = []
    for side, place in zip(sides, centre, strict=True):
        half = int(side * np.sqrt(1.0 - share)) // 2
        middle = int(side * place)
        slices.append(slice(max(middle - half, 0), min(middle + half, side)))
    return slices
