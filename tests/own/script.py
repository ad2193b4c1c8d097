"""A task whose evaluations follow a list: what is done about them can be told beforehand."""

from __future__ import annotations

import os

import torch
from torch import nn

import distml


class One(nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1, dtype=dtype))


class Script(distml.Task):
    """The score of version v is `values[v / every - 1]`; the weight says which version it is of."""

    def __init__(self, values: list[float], every: int = 3, dtype: str = "float64") -> None:
        self.values, self.every, self.dtype = values, every, getattr(torch, dtype)

    def build_model(self) -> nn.Module:
        return One(self.dtype)

    def data(self, split: str) -> tuple[torch.Tensor]:
        return (torch.zeros(24, 1),)

    def loss(self, model: One, batch: tuple, progress: distml.Progress) -> torch.Tensor:
        return model.weight.sum()

    def evaluate(self, model: One, part: distml.Part, progress: distml.Progress) -> dict[str, distml.Mean]:
        place = min(max(progress.version // self.every, 1), len(self.values)) - 1
        score = self.values[place]
        return {"score": distml.Mean(score, 1.0), "loss": distml.Mean(-score, 1.0),
                "weight": distml.Mean(float(model.weight[0]), 1.0)}  # fmt: skip


class Fragile(Script):
    """Its evaluation of one version fails as long as a file is there."""

    def __init__(self, values: list[float], at: int, file: str, **args) -> None:
        super().__init__(values, **args)
        self.at, self.file = at, file

    def evaluate(self, model: One, part: distml.Part, progress: distml.Progress) -> dict[str, distml.Mean]:
        if progress.version == self.at and os.path.exists(self.file):
            raise OSError("the disk is full")
        return super().evaluate(model, part, progress)


class Ranked(Script):
    """Only what rank 1 evaluates reaches the goal."""

    def stream(self, part: distml.Part) -> None:
        self.rank = part.index

    def evaluate(self, model: One, part: distml.Part, progress: distml.Progress) -> dict[str, distml.Mean]:
        return {"score": distml.Mean(float(self.rank), 1.0), "version": distml.Mean(progress.version, 1.0),
                "weight": distml.Mean(float(model.weight[0]), 1.0)}  # fmt: skip
