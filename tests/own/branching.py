"""A loss of two branches: both, or only one, by rank or by step."""

from __future__ import annotations

import torch
from torch import nn

import distml


class Branching(distml.Task):
    """Rows of [B, 3]; `uses`: both, `first` (the second is never used), `by step`, `by batch` (which sums differ)."""

    def __init__(self, uses: str) -> None:
        self.uses = uses

    def build_model(self) -> nn.Module:
        return nn.ModuleList([nn.Linear(3, 4), nn.Linear(3, 4)])

    def data(self, split: str) -> tuple[torch.Tensor, ...]:
        generator = torch.Generator().manual_seed(3)
        return (torch.randn(48, 3, generator=generator),)

    def loss(self, model: nn.ModuleList, batch: tuple, progress: distml.Progress) -> torch.Tensor:
        (rows,) = batch
        chosen = {"both": 2, "first": 1, "by step": 1 + progress.version % 2, "by batch": 1 + int(rows.sum() > 0)}
        return torch.stack([branch(rows).square().mean() for branch in model[: chosen[self.uses]]]).sum()
