"""The task of `distml bench population --part exploit`: many weights, and next to nothing to do with them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from distml.tasks.base import Mean, Part, Progress, Task


class Vector(nn.Module):
    """Weights, zero at first."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(size))


class Wide(Task):
    """Minimises the sum of all weights.

    Args:
        size: how many there are.
    """

    def __init__(self, size: int) -> None:
        self.size = size

    def build_model(self) -> nn.Module:
        return Vector(self.size)

    def data(self, split: str) -> Tensor:
        return torch.zeros(4, 1)

    def loss(self, model: nn.Module, batch: Any, progress: Progress) -> Tensor:
        return model.get_parameter("weight").sum()

    def evaluate(self, model: nn.Module, part: Part, progress: Progress) -> dict[str, Mean]:
        return {"score": Mean(1.0, 1)}
