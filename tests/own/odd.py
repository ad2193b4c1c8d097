"""Metrics that are NaN or infinite where the loss itself is not."""

from __future__ import annotations

import math

from small import Small
from torch import nn

import distml


class Odd(Small):
    """The validation loss is NaN up to version 6; two metrics are never finite."""

    def loss(self, model: nn.Module, batch: tuple, progress: distml.Progress) -> distml.Loss:
        loss = super().loss(model, batch, progress)
        return distml.Loss(loss.total, loss.count, {"nan": distml.Mean(math.nan, 1), "inf": distml.Mean(-math.inf, 1)})

    def evaluate(self, model: nn.Module, part: distml.Part, progress: distml.Progress) -> dict[str, distml.Mean]:
        loss = super().loss(model, part.data(), progress)
        total = math.nan if progress.version <= 6 else float(loss.total)
        return {"loss": distml.Mean(total, loss.count), "inf": distml.Mean(math.inf, 1.0)}
