"""A task for sweeps: one weight that is pulled to 1, and what a trial can do wrong besides."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import torch
from torch import nn

import distml


class Tuned(distml.Task):
    """Loss (w - 1)² from w = 0; evaluation reports it as `loss`, and `cost`, the argument.

    Args:
        mode: good; broken: its loss raises; nan; nan-later: from step 4 on. In the first trial only: broken-once;
            dies-once, stopped-once: its process does, or is; blocked-once: its loss sleeps.
        folder: where it is noted what has happened.
    """

    def __init__(self, cost: float = 0.0, mode: str = "good", folder: str = "") -> None:
        self.cost, self.mode, self.folder = cost, mode, folder

    def build_model(self) -> nn.Module:
        model = nn.Linear(1, 1, bias=False)
        nn.init.zeros_(model.weight)
        return model

    def data(self, split: str) -> tuple[torch.Tensor]:
        return (torch.ones(8, 1),)

    def loss(self, model: nn.Module, batch: tuple, progress: distml.Progress) -> distml.Loss:
        if self.mode == "broken" or (self.mode == "broken-once" and self._is_first()):
            raise RuntimeError("broken by its argument")
        if self.mode == "dies-once" and self._is_first():
            os.kill(os.getpid(), signal.SIGKILL)
        if self.mode == "blocked-once" and self._is_first():
            time.sleep(1e6)
        if self.mode == "stopped-once" and self._is_first():
            os.kill(os.getpid(), signal.SIGSTOP)
        is_nan = self.mode == "nan" or (self.mode == "nan-later" and progress.version >= 4)
        error = model(batch[0]) - (float("nan") if is_nan else 1.0)
        return distml.Loss(error.square().sum(), len(batch[0]))

    def _is_first(self) -> bool:
        file = Path(self.folder) / self.mode
        first = not file.exists()
        file.touch()
        return first

    def evaluate(self, model: nn.Module, part: distml.Part, progress: distml.Progress) -> dict[str, distml.Mean]:
        (rows,) = part.data()
        error = model(rows) - 1.0
        cost = distml.Mean(self.cost * len(rows), len(rows))
        return {"loss": distml.Mean(float(error.square().sum()), len(rows)), "cost": cost}
