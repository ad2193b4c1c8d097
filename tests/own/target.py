"""A slow copy of the weights, kept in a buffer by `after_update`, that the loss pulls towards."""

from __future__ import annotations

import torch
from torch import nn

import distml

RATE = 0.25


class Slow(nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, dtype=torch.float64).to(dtype))
        self.register_buffer("slow", self.weight.detach().clone())


class Target(distml.Task):
    def __init__(self, dtype: str = "float64") -> None:
        self.dtype = getattr(torch, dtype)

    def build_model(self) -> nn.Module:
        return Slow(self.dtype)

    def data(self, split: str) -> tuple[torch.Tensor, ...]:
        generator = torch.Generator().manual_seed(11)
        inputs = torch.randn(30, 4, generator=generator, dtype=torch.float64).to(self.dtype)
        return inputs, inputs.sum(1)

    def loss(self, model: Slow, batch: tuple, progress: distml.Progress) -> torch.Tensor:
        inputs, targets = batch
        pull = (model.weight - model.slow).square().sum()
        return (inputs @ model.weight - targets).square().mean() + pull

    def after_update(self, model: Slow, progress: distml.Progress) -> None:
        model.slow.lerp_(model.weight, RATE)
