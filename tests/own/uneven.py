"""Sequences of unequal length: a loss over tokens, whose number differs from worker to worker."""

from __future__ import annotations

import torch
from torch import nn

import distml


class Uneven(distml.Task):
    def __init__(self, dtype: str = "float64") -> None:
        self.dtype = getattr(torch, dtype)

    def build_model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1)).to(self.dtype)

    def data(self, split: str) -> tuple[torch.Tensor, ...]:
        """Inputs [50, 6, 4], the number of tokens that count in each row [50], targets [50, 6]."""
        generator = torch.Generator().manual_seed(5)
        inputs = torch.randn(50, 6, 4, generator=generator, dtype=torch.float64).to(self.dtype)
        lengths = 1 + torch.arange(50) % 6
        return inputs, lengths, inputs.sum(2)

    def loss(self, model: nn.Module, batch: tuple, progress: distml.Progress) -> distml.Loss:
        inputs, lengths, targets = batch
        counts = torch.arange(6) < lengths[:, None]
        errors = (model(inputs).squeeze(2) - targets).square()[counts]
        return distml.Loss(errors.sum(), len(errors), {"error": distml.Mean(float(errors.detach().sum()), len(errors))})
