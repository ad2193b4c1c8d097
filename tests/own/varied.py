"""Which parameters a loss depends on varies from batch to batch; sometimes on none, and one is never used."""

from __future__ import annotations

import torch
from torch import nn

import distml

KINDS = 4  # of rows; those of the last kind count, but bring no gradient


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.branches = nn.ModuleList([nn.Linear(3, 1) for _ in range(KINDS - 1)])
        self.idle = nn.Parameter(torch.ones(5))


class Varied(distml.Task):
    def build_model(self) -> nn.Module:
        return Branches().double()

    def data(self, split: str) -> tuple[torch.Tensor, ...]:
        generator = torch.Generator().manual_seed(13)
        inputs = torch.randn(48, 3, generator=generator, dtype=torch.float64)
        return inputs, torch.randint(2 * KINDS, (48,), generator=generator).clamp(max=KINDS - 1)

    def loss(self, model: Branches, batch: tuple, progress: distml.Progress) -> distml.Loss:
        inputs, kinds = batch
        total = torch.zeros((), dtype=torch.float64)
        for kind, branch in enumerate(model.branches):
            rows = inputs[kinds == kind]
            if len(rows):
                total = total + (branch(rows).squeeze(1) - rows.sum(1)).square().sum()
        return distml.Loss(total, len(inputs))
