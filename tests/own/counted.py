"""A model that keeps the moments of all rows its workers have seen, and of whom; each worker's batches are its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

import distml
from distml.tasks.data import mix

WIDTH, RANKS = 3, 4


def rows_of(rank: int, number: int) -> Tensor:
    """The inputs [2 + rank, D] of a rank's `number`-th batch, far from zero."""
    generator = torch.Generator().manual_seed(mix(rank, number))
    return 5.0 + rank + torch.randn(2 + rank, WIDTH, generator=generator, dtype=torch.float64)


class Moments(distml.Accumulator):
    """Count, mean and sum of squared deviations (Chan et al. 1983), and how many batches each rank has seen."""

    sums = ("new_count", "new_total", "new_squares", "new_batches")

    def __init__(self) -> None:
        super().__init__()
        for name in ("count", "mean", "m2", "batches", *self.sums):
            size = RANKS if name.endswith("batches") else 1 if name.endswith("count") else WIDTH
            self.register_buffer(name, torch.zeros(size, dtype=torch.float64))

    def see(self, rows: Tensor, rank: int) -> None:
        shifted = rows - self.mean
        self.new_count += len(rows)
        self.new_total += shifted.sum(0)
        self.new_squares += shifted.square().sum(0)
        self.new_batches[rank] += 1

    def absorb(self) -> None:
        if self.new_count > 0:
            count, shift = self.count + self.new_count, self.new_total / self.new_count
            self.m2 += self.new_squares - self.new_total * shift
            self.m2 += shift.square() * self.count * self.new_count / count
            self.mean += shift * self.new_count / count
            self.count.copy_(count)
        self.batches += self.new_batches
        for name in self.sums:
            self.get_buffer(name).zero_()

    def rebase(self, before: Mapping[str, Tensor]) -> None:
        shift = before["mean"] - self.mean
        self.new_squares += 2 * shift * self.new_total + self.new_count * shift.square()
        self.new_total += self.new_count * shift


class Averaged(nn.Module):
    """The same buffers in a module that is no accumulator: they are averaged (the control)."""

    def __init__(self) -> None:
        super().__init__()
        for name, buffer in Moments().named_buffers():
            self.register_buffer(name, buffer)

    see = Moments.see


def moments(rows: Tensor) -> tuple[float, Tensor, Tensor]:
    """Of all rows at once: the oracle."""
    return float(len(rows)), rows.mean(0), (rows - rows.mean(0)).square().sum(0)


class Rows:
    def __init__(self, part: distml.Part) -> None:
        self.part, self.number = part, 0

    def next(self, model: nn.Module, progress: distml.Progress) -> tuple[Tensor, Tensor]:
        self.number += 1
        rows = rows_of(self.part.index, self.number)
        return rows, torch.full((len(rows),), self.part.index)

    def state(self) -> dict[str, Any]:
        return {"number": self.number}

    def load_state(self, state: dict[str, Any]) -> None:
        self.number = state["number"]


class Counted(distml.Task):
    """What is counted has no part in the loss: weights are as they would be without."""

    def __init__(self, averaged: bool = False) -> None:
        self.averaged = averaged

    def build_model(self) -> nn.Module:
        model = nn.Linear(WIDTH, 1).double()
        model.seen = Averaged() if self.averaged else Moments()
        return model

    def stream(self, part: distml.Part) -> Rows:
        return Rows(part)

    def loss(self, model: nn.Module, batch: tuple, progress: distml.Progress) -> distml.Loss:
        rows, ranks = batch
        if torch.is_grad_enabled():
            model.seen.see(rows, int(ranks[0]))
        return distml.Loss((model(rows).squeeze(1) - rows.sum(1)).square().sum(), len(rows))

    def evaluate(self, model: nn.Module, part: distml.Part, progress: distml.Progress) -> dict[str, distml.Mean]:
        return {"loss": distml.Mean(0.0, 1)}
