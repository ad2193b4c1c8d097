"""A task that asks for more memory than there is, at one step."""

from __future__ import annotations

import torch
from torch import nn

from distml import Task


class Hungry(Task):
    """Allocates 64 GiB in its loss at the version `at`; how: torch, numpy or neither."""

    def __init__(self, at: int = 2, how: str = "torch") -> None:
        self.at, self.how = at, how

    def build_model(self) -> nn.Module:
        return nn.Linear(4, 1)

    def data(self, split: str) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.ones(64, 4), torch.ones(64, 1)

    def loss(self, model, batch, progress):
        inputs, targets = batch
        loss = (model(inputs) - targets).square().mean()
        if progress.version == self.at and self.how == "torch":
            torch.empty(2**36, dtype=torch.uint8).zero_()
        if progress.version == self.at and self.how == "numpy":
            import numpy as np

            np.ones(2**33)
        return loss
