"""Our side of `distml bench exchange`: the task. It is copied beside each run's spec, where a user's own task lies."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from distml.bench.peers.blocks import StepClock, build_model, examples
from distml.tasks.base import Mean, Part, Progress, Task


class Blocks(Task):
    """Mean-squared error of the peers' model.

    Args:
        width: of the model.
        folder: where each worker records its steps.
    """

    def __init__(self, width: int, folder: str) -> None:
        self.width, self.folder = width, folder

    def build_model(self) -> nn.Module:
        return build_model(self.width)

    def data(self, split: str) -> tuple[Tensor, Tensor]:
        return examples(self.width)

    def stream(self, part: Part) -> None:
        self.clock = StepClock(self.folder, part.index)

    def loss(self, model: nn.Module, batch: Any, progress: Progress) -> Tensor:
        self.clock.tick()
        inputs, targets = batch
        return nn.functional.mse_loss(model(inputs), targets)

    def evaluate(self, model: nn.Module, part: Part, progress: Progress) -> dict[str, Mean]:
        self.clock.flush()
        return {}
