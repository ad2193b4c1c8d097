"""A regression whose process ends itself, once, in the evaluation at or after a version."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import torch
from torch import nn

from distml import Task


class Mortal(Task):
    def __init__(self, marker: str, version: int, split: str = "validation", pause_s: float = 0.0) -> None:
        self.marker, self.version, self.split, self.pause_s = Path(marker), version, split, pause_s

    def build_model(self):
        return nn.Linear(3, 1)

    def data(self, split):
        inputs = torch.randn(64, 3, generator=torch.Generator().manual_seed(len(split)))
        return inputs, inputs.sum(1, keepdim=True)

    def loss(self, model, batch, progress):
        inputs, targets = batch
        return (model(inputs) - targets).square().mean()

    def evaluate(self, model, part, progress):
        if part.split == self.split and progress.version >= self.version and not self.marker.exists():
            self.marker.touch()
            time.sleep(self.pause_s)
            os.kill(os.getpid(), signal.SIGKILL)
        return super().evaluate(model, part, progress)
