"""A generator and a discriminator on one-dimensional data: two phases, each over its own parameters."""

from __future__ import annotations

import torch
from torch import nn

import distml


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.g = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 1))
        self.d = nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 1))


class GAN(distml.Task):
    phases = (("d_loss", "d.*"), ("g_loss", "g.*"))

    def build_model(self) -> nn.Module:
        return Pair().double()

    def data(self, split: str) -> tuple[torch.Tensor, torch.Tensor]:
        generator = torch.Generator().manual_seed(7)
        real = 1.5 + 0.5 * torch.randn(60, 1, generator=generator, dtype=torch.float64)
        return real, torch.randn(60, 2, generator=generator, dtype=torch.float64)

    def d_loss(self, model: Pair, batch: tuple, progress: distml.Progress) -> distml.Loss:
        real, noise = batch
        total = nn.functional.softplus(-model.d(real)).sum() + nn.functional.softplus(model.d(model.g(noise))).sum()
        return distml.Loss(total, len(real))

    def g_loss(self, model: Pair, batch: tuple, progress: distml.Progress) -> distml.Loss:
        _, noise = batch
        return distml.Loss(nn.functional.softplus(-model.d(model.g(noise))).sum(), len(noise))

    def evaluate(self, model: Pair, part: distml.Part, progress: distml.Progress) -> dict[str, distml.Mean]:
        loss = self.d_loss(model, part.data(), progress)
        return {"loss": distml.Mean(float(loss.total), loss.count)}
