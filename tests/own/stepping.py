"""A regression whose batches say how many environment steps they are the first to use: neither rows nor examples."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

import distml
from distml.tasks.data import mix


def frames_of(rank: int, number: int) -> int:
    """Of a rank's `number`-th batch; 0 every third time, as when a batch is used again."""
    return 0 if number % 3 == 2 else 5 + mix(rank, number) % 7


class Steps:
    """Batch after batch of one worker."""

    def __init__(self, part: distml.Part) -> None:
        self.part, self.number = part, 0

    def next(self, model: nn.Module, progress: distml.Progress) -> tuple[torch.Tensor, torch.Tensor]:
        rows, self.number = max(1, self.part.batch_size), self.number + 1
        generator = torch.Generator().manual_seed(mix(self.part.index, self.number))
        frames = torch.zeros(rows)
        frames[0] = frames_of(self.part.index, self.number)
        return torch.randn(rows, 3, generator=generator), frames

    def state(self) -> dict[str, Any]:
        return {"number": self.number}

    def load_state(self, state: dict[str, Any]) -> None:
        self.number = state["number"]


class Stepping(distml.Task):
    def build_model(self) -> nn.Module:
        return nn.Linear(3, 1)

    def stream(self, part: distml.Part) -> Steps:
        return Steps(part)

    def loss(self, model: nn.Module, batch: tuple, progress: distml.Progress) -> distml.Loss:
        inputs, frames = batch
        metrics = {"error": distml.Mean(1.0, 2), "rl/age_mean": distml.Mean(3.0, 2)}
        total = (model(inputs).squeeze(1) - inputs.sum(1)).square().sum()
        return distml.Loss(total, 2 * len(inputs), metrics, frames=float(frames.sum()))

    def evaluate(self, model: nn.Module, part: distml.Part, progress: distml.Progress) -> dict[str, distml.Mean]:
        return {"frames": distml.Mean(float(progress.frames), 1)}
