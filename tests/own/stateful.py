"""Streams whose state cannot be saved, or cannot be loaded."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from small import Small

import distml

STATES: dict[str, Any] = {
    "good": {"a": [1, (2.5, None)], "b": np.arange(3), "c": {"d": torch.ones(2), "e": np.float32(0.5)}, "f": "g"},
    "set": {"a": [0, {"b": {1, 2}}]},
    "generator": {"generator": torch.Generator()},
    "key": {"seen": {3: True}},
    "objects": {"names": np.array(["a", None], dtype=object)},
    "text array": {"names": np.array(["a", "b"])},
    "complex": {"z": torch.ones(2, dtype=torch.complex64)},
}


class Rows:
    def __init__(self, task: Stateful, part: distml.Part) -> None:
        self.task, self.part, self.dataset = task, part, task.data(part.split)

    def next(self, model: object, progress: distml.Progress) -> tuple:
        return tuple(tensor[: self.part.batch_size] for tensor in self.dataset)

    def state(self) -> dict[str, Any]:
        return STATES[self.task.state]

    def load_state(self, state: dict[str, Any]) -> None:
        if self.part.index == self.task.bad_rank:
            raise KeyError("position")
        assert state["a"] == [1, [2.5, None]]
        assert state["b"].tolist() == [0, 1, 2]
        assert torch.equal(state["c"]["d"], torch.ones(2))


class Stateful(Small):
    def __init__(self, state: str, bad_rank: int | None = None) -> None:
        super().__init__()
        self.state, self.bad_rank = state, bad_rank

    def stream(self, part: distml.Part) -> Rows:
        return Rows(self, part)
