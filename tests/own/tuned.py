"""A task for sweeps: one weight that is pulled to 1, and what a trial can do wrong besides."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import torch
from torch import nn

from distml.tasks.base import Loss, Mean, Task


class Tuned(Task):
    """Loss (w - 1)²; evaluation reports it as `loss`, and `cost`, the argument.

    Args:
        cost: reported as it is.
        broken: raises in the loss as often as there is no file of this many lines in `folder`.
        dies: the process ends itself once.
        folder: where it is noted what has happened.
    """

    def __init__(self, cost: float = 0.0, broken: int = 0, dies: bool = False, folder: str = "") -> None:
        self.cost, self.broken, self.dies, self.folder = cost, broken, dies, folder

    def build_model(self) -> nn.Module:
        model = nn.Linear(1, 1, bias=False)
        nn.init.zeros_(model.weight)
        return model

    def data(self, split: str) -> tuple[torch.Tensor]:
        return (torch.ones(8, 1),)

    def loss(self, model, batch, progress):
        if self.dies and self._happened("died") < 1:
            os.kill(os.getpid(), signal.SIGKILL)
        if self.broken and self._happened(f"failed-{self.cost}") < self.broken:
            raise RuntimeError("broken by its argument")
        error = model(batch[0]) - 1.0
        return Loss(error.square().sum(), len(batch[0]))

    def _happened(self, name: str) -> int:
        """How often it has happened before; now it has once more."""
        file = Path(self.folder) / name
        before = len(file.read_text()) if file.exists() else 0
        file.write_text("x" * (before + 1))
        return before

    def evaluate(self, model, part, progress):
        rows = part.data()[0]
        error = model(rows) - 1.0
        return {"loss": Mean(float(error.square().sum()), len(rows)), "cost": Mean(self.cost * len(rows), len(rows))}
