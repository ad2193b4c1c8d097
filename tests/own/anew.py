"""A stream that cannot be saved: it begins anew at checkpoints, and draws from the global generators as it begins."""

from __future__ import annotations

import numpy as np
import torch
from grow import Grow
from torch import nn

import distml


class Episode:
    def __init__(self, part: distml.Part) -> None:
        self.size, self.at = part.batch_size, torch.randn(3, dtype=torch.float64) + float(np.random.randn())

    def next(self, model: nn.Module, progress: distml.Progress) -> torch.Tensor:
        self.at = 0.9 * self.at + 0.1 * torch.randn(3, dtype=torch.float64)
        return self.at + torch.randn(self.size, 3, dtype=torch.float64)

    def state(self) -> None:
        return None

    def load_state(self, state: dict) -> None:
        raise AssertionError("there is no state to load")


class Anew(Grow):
    def stream(self, part: distml.Part) -> Episode:
        return Episode(part)
