"""A loss on outputs less their mean over the whole batch: a collective inside the update."""

from __future__ import annotations

from torch import nn
from uneven import Uneven

import distml


class Centred(Uneven):
    needs = frozenset({"group_mean"})

    def loss(self, model: nn.Module, batch: tuple, progress: distml.Progress) -> distml.Loss:
        inputs, _, targets = batch
        outputs = model(inputs)[:, 0, 0]
        centre = self.group_mean(outputs.mean())
        return distml.Loss((outputs - centre - targets[:, 0]).square().sum(), len(outputs))
