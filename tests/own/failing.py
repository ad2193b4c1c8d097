"""A small classifier whose loss fails, is NaN, or waits for a file, from a version on."""

from __future__ import annotations

import time
from pathlib import Path

import torch
from small import Small

import distml


class Failing(Small):
    def __init__(self, how: str = "", version: int = 0, file: str = "", **args) -> None:
        super().__init__(**args)
        self.how, self.version, self.file = how, version, file

    def loss(self, model, batch, progress: distml.Progress) -> distml.Loss:
        loss = super().loss(model, batch, progress)
        if progress.version < self.version or not model.training:
            return loss
        if self.how == "raise":
            raise KeyError("no such word")
        while self.how == "wait" and not Path(self.file).exists():
            time.sleep(0.01)
        return distml.Loss(loss.total * torch.nan, loss.count) if self.how == "nan" else loss
