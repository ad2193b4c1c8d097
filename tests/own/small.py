"""A classifier of random points, small enough for an oracle beside it; float64 by default."""

from __future__ import annotations

import torch
from torch import nn

import distml


class Small(distml.Task):
    """[B, 5] -> 3 classes over a hidden layer; 1,155 parameters, several blocks of the flat vector."""

    def __init__(self, dtype: str = "float64", rows: int = 40, hidden: int = 128, dropout: float = 0.0) -> None:
        self.dtype, self.rows, self.hidden, self.dropout = getattr(torch, dtype), rows, hidden, dropout

    def build_model(self) -> nn.Module:
        middle = [nn.Dropout(self.dropout)] if self.dropout else []
        return nn.Sequential(nn.Linear(5, self.hidden), nn.Tanh(), *middle, nn.Linear(self.hidden, 3)).to(self.dtype)

    def data(self, split: str) -> tuple[torch.Tensor, torch.Tensor]:
        generator = torch.Generator().manual_seed({"train": 1, "validation": 2, "test": 3}[split])
        inputs = torch.randn(self.rows, 5, generator=generator, dtype=torch.float64)
        return inputs.to(self.dtype), torch.randint(3, (self.rows,), generator=generator)

    def loss(self, model: nn.Module, batch: tuple, progress: distml.Progress) -> distml.Loss:
        inputs, labels = batch
        return distml.Loss(nn.functional.cross_entropy(model(inputs), labels, reduction="sum"), len(labels))
