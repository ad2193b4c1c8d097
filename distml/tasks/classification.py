"""`task: classification`: cross-entropy on labelled images.

Shapes: B examples, K classes; labels [B] int64. Images are float32: digits [B, 8, 8] in [0, 1], cifar10
[B, 3, 32, 32], normalised per channel.
"""

from __future__ import annotations

import gzip
import importlib.util
import math
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from distml.spec.architectures import NasNetSpec, StagesSpec
from distml.spec.schema import CNNSpec, ImageModelSpec
from distml.tasks.base import Loss, Mean, Part, Progress, Task
from distml.tasks.data import Dataset
from distml.tasks.models import CNN, MLP

Examples = tuple[Tensor, Tensor]
SHAPES = {"digits": (1, 8, 8), "cifar10": (3, 32, 32)}  # channels, height, width
CLASSES = 10


class Classification(Task):
    """Cross-entropy, accuracy in evaluation; three splits, cut once by `split_seed`: of digits 60, 20 and 20 %.

    `label_noise` of the training labels are wrong, which ones and how drawn by `split_seed` too.
    """

    def __init__(
        self, data: str, model: ImageModelSpec, split_seed: int = 0, path: str | None = None, label_noise: float = 0.0
    ) -> None:
        self.name, self.model_spec, self.split_seed, self.path = data, model, split_seed, path
        self.label_noise = label_noise

    @property
    def image(self) -> tuple[int, int, int]:
        """Channels, height and width."""
        return SHAPES[self.name]

    def build_model(self) -> nn.Module:
        spec = self.model_spec
        if isinstance(spec, CNNSpec):
            return CNN(self.image, spec.channels, spec.hidden, CLASSES, spec.dropout)
        if isinstance(spec, NasNetSpec | StagesSpec):
            from distml.tasks.architectures import NasNet, Stages

            return (
                NasNet(spec, self.image, CLASSES) if isinstance(spec, NasNetSpec) else Stages(spec, self.image, CLASSES)
            )
        return MLP(math.prod(self.image), spec.hidden, CLASSES, spec.dropout)

    def data(self, split: str) -> Dataset:
        if self.name == "cifar10":
            from distml.tasks.cifar import load_cifar10

            photographs = load_cifar10(Path(self.path or ""), self.split_seed)[split]
            if split != "train" or not self.label_noise:
                return photographs
            return photographs.labelled(with_noise(photographs.labels, self.label_noise, self.split_seed))
        images, labels = splits(load_digits, self.split_seed)[split]
        return images, with_noise(labels, self.label_noise, self.split_seed) if split == "train" else labels

    def loss(self, model: nn.Module, batch: Examples, progress: Progress) -> Loss:
        images, labels = batch
        return Loss(nn.functional.cross_entropy(model(images), labels, reduction="sum"), len(labels))

    def evaluate(self, model: nn.Module, part: Part, progress: Progress) -> dict[str, Mean]:
        images, labels = part.data()
        logits = model(images)
        count = len(labels)
        return {
            "loss": Mean(float(nn.functional.cross_entropy(logits, labels, reduction="sum")), count),
            "accuracy": Mean(float((logits.argmax(1) == labels).sum()), count),
        }


def with_noise(labels: Tensor, share: float, seed: int) -> Tensor:
    """Labels [N] of which `share` (exactly, rounded) are another class, each other one as likely."""
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(labels), generator=generator)[: round(share * len(labels))]
    noisy = labels.clone()
    noisy[chosen] = (labels[chosen] + torch.randint(1, CLASSES, (len(chosen),), generator=generator)) % CLASSES
    return noisy


@cache
def load_digits() -> Examples:
    """scikit-learn's 1,797 handwritten digits (UCI optical recognition, Alpaydin & Kaynak 1998).

    The file is read without importing scikit-learn where it lies in the usual place: the import alone takes longer
    than the training of a small model.
    """
    found = importlib.util.find_spec("sklearn")
    file = Path(found.origin).parent / "datasets" / "data" / "digits.csv.gz" if found and found.origin else None
    if file is not None and file.exists():
        with gzip.open(file, "rt") as lines:
            table = np.loadtxt(lines, delimiter=",", dtype=np.float32)
        images, labels = table[:, :64], table[:, 64]
    else:
        from sklearn.datasets import load_digits as load

        images, labels = load(return_X_y=True)
    scaled = torch.from_numpy(images.astype(np.float32) / 16.0).reshape(-1, 8, 8)
    return scaled, torch.from_numpy(labels.astype(np.int64))


@cache
def splits(load: object, seed: int) -> dict[str, Examples]:
    """Train, validation and test: 60, 20 and 20 % of a permutation drawn from `seed`."""
    images, labels = load()  # type: ignore[operator]
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    first, second = round(len(order) * 0.6), round(len(order) * 0.8)
    parts = {"train": order[:first], "validation": order[first:second], "test": order[second:]}
    return {name: (images[indices], labels[indices]) for name, indices in parts.items()}
