"""Our networks once more as PyTorch modules: NCHW images to logits, with Keras's weights.

Layers are defined in the order in which the Keras functions make theirs: weights are handed over
by kind and place.
"""

import re

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F


class SmallCNN(nn.Module):
    """``keras_emr.small_cnn`` without dropout."""

    def __init__(self, shape, classes):
        super().__init__()
        height, width, channels = shape
        padding = 0 if min(height, width) >= 16 else 1
        conv = [(channels, 32), (32, 32), (32, 64), (64, 64)]
        self.conv = nn.ModuleList(nn.Conv2d(*pair, 3, padding=padding) for pair in conv)

        def pooled(side):
            return (side - 4 * (1 - padding)) // 2

        # The rows of the first dense layer: Keras flattens (H, W, C).
        self.flattened = (pooled(pooled(height)), pooled(pooled(width)), 64)
        self.dense = nn.Sequential(
            nn.Flatten(),
            nn.Linear(int(np.prod(self.flattened)), 200),
            nn.ReLU(),
            nn.Linear(200, 200),
            nn.ReLU(),
            nn.Linear(200, classes),
        )

    def forward(self, x):
        for i, conv in enumerate(self.conv):
            x = F.relu(conv(x))
            if i % 2:
                x = F.max_pool2d(x, 2)
        return self.dense(x)


def _conv(before, planes, size=3, stride=1):
    return nn.Conv2d(before, planes, size, stride, padding=size // 2, bias=False)


class _Residual(nn.Module):
    """Two convolutions, each with BatchNorm and ReLU behind it."""

    def __init__(self, before, planes, stride):
        super().__init__()
        self.shortcut = nn.Identity()
        if stride != 1 or before != planes:
            conv = _conv(before, planes, 1, stride)
            self.shortcut = nn.Sequential(conv, nn.BatchNorm2d(planes))
        self.conv1 = _conv(before, planes, 3, stride)
        self.norm1 = nn.BatchNorm2d(planes)
        self.conv2 = _conv(planes, planes)
        self.norm2 = nn.BatchNorm2d(planes)

    def forward(self, x):
        y = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(y)) + self.shortcut(x))


class ResNet18(nn.Module):
    """``keras_emr.models.resnet.resnet18``."""

    def __init__(self, shape, classes, width=64):
        super().__init__()
        self.stem = _conv(shape[-1], width)
        self.norm = nn.BatchNorm2d(width)
        blocks, before = [], width
        for stage in range(4):
            planes = width * 2**stage
            blocks.append(_Residual(before, planes, 2 if stage else 1))
            blocks.append(_Residual(planes, planes, 1))
            before = planes
        self.blocks = nn.Sequential(*blocks)
        self.logits = nn.Linear(before, classes)

    def forward(self, x):
        x = self.blocks(F.relu(self.norm(self.stem(x))))
        return self.logits(x.mean((2, 3)))


class _PreActivation(nn.Module):
    """BatchNorm and ReLU before each of two convolutions; a shortcut of the activated image."""

    def __init__(self, before, planes, stride):
        super().__init__()
        self.norm1 = nn.BatchNorm2d(before)
        self.shortcut = _conv(before, planes, 1, stride) if before != planes else None
        self.conv1 = _conv(before, planes, 3, stride)
        self.norm2 = nn.BatchNorm2d(planes)
        self.conv2 = _conv(planes, planes)

    def forward(self, x):
        active = F.relu(self.norm1(x))
        shortcut = x if self.shortcut is None else self.shortcut(active)
        return self.conv2(F.relu(self.norm2(self.conv1(active)))) + shortcut


class WideResNet(nn.Module):
    """``keras_emr.models.wide_resnet.wide_resnet``, variant ``trades``."""

    def __init__(self, shape, classes, depth, widen):
        super().__init__()
        self.stem = _conv(shape[-1], 16)
        blocks, before = [], 16
        for stage in range(3):
            planes = 16 * widen * 2**stage
            for block in range((depth - 4) // 6):
                blocks.append(_PreActivation(before, planes, 2 if stage and not block else 1))
                before = planes
        self.blocks = nn.Sequential(*blocks)
        self.norm = nn.BatchNorm2d(before)
        self.logits = nn.Linear(before, classes)

    def forward(self, x):
        x = F.relu(self.norm(self.blocks(self.stem(x))))
        return self.logits(x.mean((2, 3)))


def make_network(name, shape, classes):
    """The twin of ``keras_emr.make_model(name, shape, classes)``; shape (H, W, C)."""
    if name == "small-cnn":
        return SmallCNN(shape, classes)
    if name == "resnet18":
        return ResNet18(shape, classes)
    if match := re.fullmatch(r"wide-resnet-(\d+)-(\d+)", name):
        return WideResNet(shape, classes, int(match[1]), int(match[2]))
    raise SystemExit(f"no PyTorch twin of {name!r}")


_KINDS = {"Conv2D": nn.Conv2d, "BatchNormalization": nn.BatchNorm2d, "Dense": nn.Linear}


def take_weights(network, weights):
    """Put the arrays of ``our_party.keras_weights`` into a twin. Returns the twin."""
    taken = 0
    for kind, its in _KINDS.items():
        layers = [m for m in network.modules() if isinstance(m, its)]
        for i, layer in enumerate(layers):
            given = [weights[f"{kind}/{i}/{j}"] for j in range(4) if f"{kind}/{i}/{j}" in weights]
            taken += len(given)
            if kind == "Conv2D":
                given[0] = given[0].transpose(3, 2, 0, 1)
            elif kind == "Dense":
                if i == 0 and hasattr(network, "flattened"):
                    rows = np.arange(len(given[0])).reshape(network.flattened)
                    given[0] = given[0][rows.transpose(2, 0, 1).ravel()]
                given[0] = given[0].T
            _fill(layer, given)
    count = sum(name.split("/")[0] in _KINDS for name in weights)
    if taken != count:
        raise SystemExit(f"the twin has no place for {count - taken} of Keras's weights")
    return network


def _fill(layer, given):
    names = ("weight", "bias", "running_mean", "running_var")
    with torch.no_grad():
        for name, array in zip(names, given, strict=False):
            getattr(layer, name).copy_(torch.from_numpy(np.ascontiguousarray(array)))
