"""Every gradient is one per weight and example: what many workers have applied can be counted."""

from __future__ import annotations

import torch
from torch import nn

import distml


class Ones(distml.Task):
    def build_model(self) -> nn.Module:
        model = nn.Linear(700, 1, bias=False)
        nn.init.zeros_(model.weight)
        return model

    def data(self, split: str) -> tuple[torch.Tensor]:
        return (torch.ones(40, 700),)

    def loss(self, model: nn.Module, batch: tuple, progress: distml.Progress) -> torch.Tensor:
        return model(batch[0]).mean()

    def evaluate(self, model: nn.Module, part: distml.Part, progress: distml.Progress) -> dict[str, distml.Mean]:
        return {"loss": distml.Mean(0.0, 1)}
