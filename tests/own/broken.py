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


class Counts(Small):
    """The count is not one."""

    def __init__(self, count: str) -> None:
        super().__init__()
        self.count = {"vector": torch.ones(2), "nan": float("nan"), "negative": -1}[count]

    def loss(self, model: nn.Module, batch: tuple, progress: distml.Progress) -> distml.Loss:
        return distml.Loss(super().loss(model, batch, progress).total, self.count)


class Metrics(Small):
    """A metric is no mean."""

    def __init__(self, metric: str) -> None:
        super().__init__()
        self.metric = {"tensor": torch.ones(()), "float": 0.5, "vector": distml.Mean(torch.ones(2), 1)}[metric]

    def loss(self, model: nn.Module, batch: tuple, progress: distml.Progress) -> distml.Loss:
        loss = super().loss(model, batch, progress)
        return distml.Loss(loss.total, loss.count, {"m": self.metric})


class Tensors(Small):
    """Counts and means are tensors: nothing is wrong with that."""

    def loss(self, model: nn.Module, batch: tuple, progress: distml.Progress) -> distml.Loss:
        total, count = super().loss(model, batch, progress).total, torch.ones(len(batch[1])).sum()
        return distml.Loss(total, count, {"again": distml.Mean(total, count)})

    def evaluate(self, model: nn.Module, part: distml.Part, progress: distml.Progress) -> dict[str, distml.Mean]:
        loss = self.loss(model, part.data(), progress)
        return {"loss": distml.Mean(loss.total, loss.count)}


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
