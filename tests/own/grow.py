"""A stream of its own whose data grows as the run goes on, with tensors and a generator in its state."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

import distml


class Points:
    def __init__(self, part: distml.Part) -> None:
        self.size = part.batch_size
        self.generator = torch.Generator().manual_seed(part.seed % 2**63)
        self.points = torch.zeros(1, 3, dtype=torch.float64)
        self.versions: list[int] = []

    def next(self, model: nn.Module, progress: distml.Progress) -> torch.Tensor:
        spread = 1.0 + progress.fraction
        fresh = spread * torch.randn(2, 3, generator=self.generator, dtype=torch.float64)
        self.points = torch.cat([self.points, fresh])
        self.versions.append(progress.version)
        return self.points[torch.randint(len(self.points), (self.size,), generator=self.generator)]

    def state(self) -> dict[str, Any]:
        return {"points": self.points, "generator": self.generator.get_state(), "versions": self.versions}

    def load_state(self, state: dict[str, Any]) -> None:
        self.points, self.versions = state["points"], list(state["versions"])
        self.generator.set_state(state["generator"])


class Grow(distml.Task):
    def __init__(self, dtype: str = "float64") -> None:
        self.dtype = getattr(torch, dtype)

    def build_model(self) -> nn.Module:
        return nn.Linear(3, 1).to(self.dtype)

    def stream(self, part: distml.Part) -> Points:
        return Points(part)

    def loss(self, model: nn.Module, batch: torch.Tensor, progress: distml.Progress) -> torch.Tensor:
        batch = batch.to(self.dtype)
        return (model(batch).squeeze(1) - batch.sum(1)).square().mean()

    def evaluate(self, model: nn.Module, part: distml.Part, progress: distml.Progress) -> dict[str, distml.Mean]:
        error = (model.weight - 1.0).square().sum() + model.bias.square().sum()
        return {"loss": distml.Mean(float(error), 1.0)}
