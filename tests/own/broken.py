"""Tasks that go wrong in one way each."""

from __future__ import annotations

import torch
from small import Small
from torch import nn

import distml


class Lonely(Small):
    """Asks for a collective on one worker only."""

    needs = frozenset({"group_mean"})

    def stream(self, part: distml.Part) -> None:
        self.rank = part.index

    def loss(self, model: nn.Module, batch: tuple, progress: distml.Progress) -> distml.Loss:
        if self.rank == 1 and progress.version == 2:
            self.group_mean(torch.zeros(()))
        return super().loss(model, batch, progress)


class Raises(Small):
    """One worker divides by zero at one step."""

    def __init__(self, rank: int, step: int) -> None:
        super().__init__()
        self.bad = (rank, step)

    def stream(self, part: distml.Part) -> None:
        self.rank = part.index

    def loss(self, model: nn.Module, batch: tuple, progress: distml.Progress) -> distml.Loss:
        if (self.rank, progress.version) == self.bad:
            raise ZeroDivisionError("integer division or modulo by zero")
        return super().loss(model, batch, progress)


class BadModel(Small):
    def build_model(self) -> nn.Module:
        raise RuntimeError("no such layer")


class NoModel(Small):
    def build_model(self) -> nn.Module:
        return None


class Vector(Small):
    """The loss is not a scalar."""

    def loss(self, model: nn.Module, batch: tuple, progress: distml.Progress) -> torch.Tensor:
        return nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none")


class Number(Small):
    """The loss is no tensor."""

    def loss(self, model: nn.Module, batch: tuple, progress: distml.Progress) -> float:
        return 1.0


class NaN(Small):
    """The loss is NaN from one step on."""

    def __init__(self, step: int) -> None:
        super().__init__()
        self.step = step

    def loss(self, model: nn.Module, batch: tuple, progress: distml.Progress) -> distml.Loss:
        loss = super().loss(model, batch, progress)
        return distml.Loss(loss.total * float("nan"), loss.count) if progress.version >= self.step else loss


class EvaluateRaises(Small):
    def evaluate(self, model: nn.Module, part: distml.Part, progress: distml.Progress) -> dict:
        raise KeyError("accuracy")


class NoTestSplit(Small):
    def data(self, split: str) -> tuple:
        return {"train": super().data, "validation": super().data}[split](split)


class EvaluateFloat(Small):
    def evaluate(self, model: nn.Module, part: distml.Part, progress: distml.Progress) -> dict:
        return {"loss": 0.5}


class EvaluateNumber(Small):
    def evaluate(self, model: nn.Module, part: distml.Part, progress: distml.Progress) -> float:
        return 0.5


class NoTask:
    pass


class Different(Small):
    """Each construction has other weights."""

    def build_model(self) -> nn.Module:
        model = super().build_model()
        model[0].bias.data.fill_(id(self) % 1009)
        return model
