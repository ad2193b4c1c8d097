"""`task: regression`: linear least squares on generated data, whose minimum has a closed form.

Shapes: B examples, D features; inputs [B, D], targets [B].
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from distml.tasks.base import Loss, Mean, Part, Progress, Task


class Regression(Task):
    """½ (w·x + b - y)² with y = w*·x + b* + noise; splits of 60, 20 and 20 %."""

    def __init__(self, features: int, rows: int, noise: float, split_seed: int = 0) -> None:
        self.features, self.rows, self.noise, self.split_seed = features, rows, noise, split_seed

    def build_model(self) -> nn.Module:
        return nn.Linear(self.features, 1)

    def data(self, split: str) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(self.split_seed)
        inputs = torch.randn(self.rows, self.features, generator=generator)
        weights, bias = torch.randn(self.features, generator=generator), torch.randn((), generator=generator)
        targets = inputs @ weights + bias + self.noise * torch.randn(self.rows, generator=generator)
        first, second = self.rows * 3 // 5, self.rows * 4 // 5
        rows = {"train": slice(0, first), "validation": slice(first, second), "test": slice(second, None)}[split]
        return inputs[rows], targets[rows]

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor], progress: Progress) -> Loss:
        inputs, targets = batch
        return Loss(0.5 * (model(inputs).squeeze(1) - targets).square().sum(), len(targets))

    def evaluate(self, model: nn.Module, part: Part, progress: Progress) -> dict[str, Mean]:
        loss = self.loss(model, part.data(), progress)
        return {"loss": Mean(float(loss.total), loss.count)}

    def closed_form(self) -> Tensor:
        """The least-squares weights and bias on the training split ([D + 1], bias last), by the normal equations."""
        inputs, targets = self.data("train")
        augmented = torch.cat([inputs, torch.ones(len(inputs), 1)], 1).double()
        solution: Tensor = torch.linalg.solve(augmented.T @ augmented, augmented.T @ targets.double())
        return solution
