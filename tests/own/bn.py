"""A model that carries running statistics, and a count of the examples that it has seen."""

from __future__ import annotations

import torch
from small import Small
from torch import nn


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.head = nn.BatchNorm1d(5), nn.Linear(5, 3)
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.seen += len(inputs)
        return self.head(self.norm(inputs))


class BN(Small):
    def build_model(self) -> nn.Module:
        return Counting().to(self.dtype)
