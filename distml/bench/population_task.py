"""The task of `distml bench population`'s no-ops: one number that grows by the learning rate at each step."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from distml.tasks.base import Mean, Part, Progress, Task

WAIT_S = 120.0


class Number(nn.Module):
    """One weight, zero at first."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))


def meet(file: Path, together: int) -> None:
    """Create a process's file, and wait until there are as many as are expected.

    Raises:
        TimeoutError: they are not there within two minutes.
    """
    file.touch()
    deadline = time.monotonic() + WAIT_S
    while len(list(file.parent.glob("ticks-*"))) < together:
        if time.monotonic() > deadline:
            raise TimeoutError(f"{together} members did not begin within {WAIT_S:g} s")
        time.sleep(0.001)


class NoOp(Task):
    """Minimises -w, so that plain SGD adds its learning rate to w; the score is w.

    Args:
        folder: where each process records when it began each step.
        together: so many processes wait for each other before their first step.
    """

    def __init__(self, folder: str, together: int = 1) -> None:
        self.file, self.together = Path(folder) / f"ticks-{os.getpid()}", together

    def build_model(self) -> nn.Module:
        return Number()

    def data(self, split: str) -> Tensor:
        return torch.zeros(8, 1)

    def loss(self, model: nn.Module, batch: Any, progress: Progress) -> Tensor:
        if not self.file.exists():
            meet(self.file, self.together)
        with self.file.open("a") as file:
            file.write(f"{time.time()!r}\n")
        return -model.get_parameter("weight").sum()

    def evaluate(self, model: nn.Module, part: Part, progress: Progress) -> dict[str, Mean]:
        return {"score": Mean(float(model.get_parameter("weight").detach()), 1)}
