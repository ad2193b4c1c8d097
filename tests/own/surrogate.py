"""The toy surface of Jaderberg et al. 2017, figure 2: what is learned is only a surrogate of what counts.

A member climbs 1.2 - (h0 θ0² + h1 θ1²) from θ = (0.9, 0.9); it is judged by Q(θ) = 1.2 - θ0² - θ1².
"""

from __future__ import annotations

import torch
from torch import nn

import distml


class Theta(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.full((2,), 0.9, dtype=torch.float64))


class Surrogate(distml.Task):
    def __init__(self, h0: float = 1.0, h1: float = 1.0) -> None:
        self.h0, self.h1 = h0, h1

    def build_model(self) -> nn.Module:
        return Theta()

    def data(self, split: str) -> tuple[torch.Tensor]:
        return (torch.zeros(20, 1, dtype=torch.float64),)

    def loss(self, model: Theta, batch: tuple[torch.Tensor], progress: distml.Progress) -> distml.Loss:
        rows = len(batch[0])
        square = model.theta.square()
        return distml.Loss((self.h0 * square[0] + self.h1 * square[1] - 1.2) * rows, rows)

    def evaluate(self, model: Theta, part: distml.Part, progress: distml.Progress) -> dict[str, distml.Mean]:
        return {"quality": distml.Mean(1.2 - float(model.theta.square().sum()), 1.0)}
