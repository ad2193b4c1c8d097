"""The task of `distml bench population`'s no-ops: one number that grows by the learning rate at each step."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from distml.tasks.base import Mean, Part, Progress, Task


class Number(nn.Module):
    """One weight, zero at first."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))


class NoOp(Task):
    """Minimises -w, so that plain SGD adds its learning rate to w; the score is w.

    Args:
        folder: where each process records when it began each step.
    """

    def __init__(self, folder: str) -> None:
        self.file = Path(folder) / f"ticks-{os.getpid()}"

    def build_model(self) -> nn.Module:
        return Number()

    def data(self, split: str) -> Tensor:
        return torch.zeros(8, 1)

    def loss(self, model: nn.Module, batch: Any, progress: Progress) -> Tensor:
        with self.file.open("a") as file:
            file.write(f"{time.time()!r}\n")
        return -model.get_parameter("weight").sum()

    def evaluate(self, model: nn.Module, part: Part, progress: Progress) -> dict[str, Mean]:
        return {"score": Mean(float(model.get_parameter("weight").detach()), 1)}
