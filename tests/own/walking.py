"""Two linear layers whose evaluation uses them as often, or as differently, as it is told to."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from distml import Loss, Mean, Part, Progress, Task


class Walking(Task):
    """`walks`: row by row of three in all, each in its own forward; or by other modules on other ranks."""

    def __init__(self, walks: str = "row by row") -> None:
        self.walks = walks

    def build_model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(3, 16), nn.Linear(16, 1))

    def data(self, split: str) -> tuple[Tensor, ...]:
        return (torch.randn(12 if split == "train" else 3, 3, generator=torch.Generator().manual_seed(0)),)

    def loss(self, model: nn.Module, batch: tuple[Tensor, ...], progress: Progress) -> Loss:
        (rows,) = batch
        return Loss(model(rows).square().sum(), len(rows))

    def evaluate(self, model: Any, part: Part, progress: Progress) -> dict[str, Mean]:
        (rows,) = part.data()
        if self.walks == "row by row":
            return {"square": Mean(sum(float(model(row).square().sum()) for row in rows), len(rows))}
        (model if part.index == 0 else model[0])(rows)
        return {}
