"""CIFAR-10 in its binary version (Krizhevsky 2009): 60,000 colour photographs of 32 x 32, 10 classes.

A record is one byte of label and 3,072 of image: red, green and blue planes, row by row. 10,000 records a file. Nothing
is downloaded, and nothing unpickled: the version for Python is not read.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from distml.errors import UsageError

TRAINING = tuple(f"data_batch_{number}.bin" for number in range(1, 6))
TEST = ("test_batch.bin",)
SHAPE = (3, 32, 32)
RECORD = 1 + 3 * 32 * 32
VALIDATION = 5000  # of the 50,000 training images, as in Zoph et al. 2018
SOURCE = "cifar-10-binary.tar.gz from https://www.cs.toronto.edu/~kriz/cifar.html"


class Images:
    """Labelled images as bytes, which become normalised floats batch by batch: a quarter of the memory.

    Attributes:
        pixels: uint8 [N, 3, 32, 32]; labels: int64 [N].
        mean, scale: float32 [3, 1, 1], of the training images as floats in [0, 1].
    """

    def __init__(self, pixels: Tensor, labels: Tensor, mean: Tensor, scale: Tensor) -> None:
        self.pixels, self.labels, self.mean, self.scale = pixels, labels, mean, scale

    def __len__(self) -> int:
        """Images in it."""
        return len(self.labels)

    def labelled(self, labels: Tensor) -> Images:
        """The same images with other labels."""
        return Images(self.pixels, labels, self.mean, self.scale)

    def batch_at(self, indices: Tensor, place: int) -> tuple[Tensor, Tensor]:
        """(images float32 [B, 3, 32, 32] of mean 0 and deviation 1 per channel, labels [B])."""
        return (self.pixels[indices].float() / 255.0 - self.mean) / self.scale, self.labels[indices]


def check_cifar10(folder: Path) -> None:
    """Look whether all files are there, and whole.

    Raises:
        UsageError: one is not; says what to download.
    """
    for name in (*TRAINING, *TEST):
        file = folder / name
        size = file.stat().st_size if file.is_file() else None
        if size is None or size == 0 or size % RECORD:
            found = "is missing" if size is None else f"has {size} bytes, no multiple of {RECORD}"
            raise UsageError(f"{file} {found}; download {SOURCE}, unpack it, and set task.path to its folder")


@cache
def load_cifar10(folder: Path, seed: int) -> dict[str, Images]:
    """Train, validation (`VALIDATION` of the training images, drawn by `seed`) and test.

    Raises:
        UsageError: the files are not there.
    """
    check_cifar10(folder)
    pixels, labels = _read([folder / name for name in TRAINING])
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    held_out = min(VALIDATION, len(order) // 10)
    train, validation = order[held_out:], order[:held_out]
    mean, scale = _moments(pixels[train])
    parts = {"train": (pixels[train], labels[train]), "validation": (pixels[validation], labels[validation]),
             "test": _read([folder / name for name in TEST])}  # fmt: skip
    return {name: Images(*part, mean, scale) for name, part in parts.items()}


def _read(files: list[Path]) -> tuple[Tensor, Tensor]:
    rows = np.concatenate([np.fromfile(file, np.uint8).reshape(-1, RECORD) for file in files])
    return torch.from_numpy(rows[:, 1:].copy()).reshape(-1, *SHAPE), torch.from_numpy(rows[:, 0].astype(np.int64))


def _moments(pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each channel, from the counts of the 256 values."""
    values = torch.arange(256, dtype=torch.float64) / 255.0
    counts = torch.stack([torch.bincount(pixels[:, c].reshape(-1).long(), minlength=256) for c in range(SHAPE[0])])
    shares = counts.double() / counts.sum(1, keepdim=True)
    mean = shares @ values
    deviation = (shares @ values.square() - mean.square()).clamp_min(1e-12).sqrt()
    return mean.float().reshape(-1, 1, 1), deviation.float().reshape(-1, 1, 1)
