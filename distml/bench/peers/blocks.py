"""What all contenders of `distml bench exchange` train, and how each of their workers records its steps.

Shapes: B examples of a worker's batch, D width of the model.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

BLOCKS, EXPANSION = 8, 4
ROWS = 1024
LEARNING_RATE = {"sgd": 1e-2, "adam": 1e-4}


def configuration() -> dict[str, Any]:
    """The process's only argument, with torch held to one thread as every contender has it."""
    torch.set_num_threads(1)
    found: dict[str, Any] = json.loads(sys.argv[1])
    return found


def build_model(width: int) -> nn.Sequential:
    """Eight blocks [D -> 4 D -> D] with ReLU in and between them."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for _ in range(BLOCKS):
        layers += [nn.Linear(width, EXPANSION * width), nn.ReLU(), nn.Linear(EXPANSION * width, width), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def examples(width: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Inputs and targets [ROWS, D] that have nothing to do with each other."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(ROWS, width, generator=generator), torch.randn(ROWS, width, generator=generator)


class Batches:
    """Batches of B examples in turn, of data that are in memory."""

    def __init__(self, width: int, rank: int, batch_size: int) -> None:
        self.inputs, self.targets = examples(width, rank)
        self.batch_size, self.position = batch_size, 0

    def __next__(self) -> tuple[Tensor, Tensor]:
        rows = slice(self.position, self.position + self.batch_size)
        self.position = (self.position + self.batch_size) % (ROWS - self.batch_size + 1)
        return self.inputs[rows], self.targets[rows]


def build_optimizer(name: str, model: nn.Module) -> torch.optim.Optimizer:
    """torch's fused optimiser with the settings that all contenders have."""
    kind: Any = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}[name]
    optimizer: torch.optim.Optimizer = kind(model.parameters(), lr=LEARNING_RATE[name], fused=True)
    return optimizer


class StepClock:
    """When each step of one worker began, in FOLDER/times-RANK: wall clock and processor seconds of this process.

    Lines are written in lots, so that a step costs two readings of a clock.
    """

    LOT = 20

    def __init__(self, folder: str, rank: int) -> None:
        self.path, self.lines = Path(folder, f"times-{rank}"), list[str]()

    def tick(self) -> None:
        """A step begins. The wall clock is the system's monotonic one, the same for all processes."""
        self.lines.append(f"{time.monotonic():.6f} {time.process_time():.6f}\n")
        if len(self.lines) >= self.LOT:
            self.flush()

    def flush(self) -> None:
        """Write what is not yet written."""
        with open(self.path, "a", encoding="ascii") as file:
            file.writelines(self.lines)
        self.lines.clear()
