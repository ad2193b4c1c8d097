"""What tests of runs on Ray share: a small job with short limits, the driver's notes, and what a run has come to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from distml.runs.checkpoints import CheckpointStore
from distml.runs.display import SilentDisplay

SPEC: dict[str, Any] = {
    "distml": "v1",
    "name": "ray",
    "task": {"name": "classification", "model": {"name": "mlp", "hidden": [16], "dropout": 0.1}},
    "strategy": "all_reduce",
    "optimizer": {"name": "adamw", "lr": 0.003},
    "stop": {"steps": 60},
    "evaluate": {"every": 30},
    "checkpoint": {"every": 30},
    "log": {"every": 10, "to": []},
    "resources": {"workers": 2},
    "limits": {"heartbeat_s": 0.5, "lost_after_s": 5.0, "start_s": 60.0},
}
TIMES = ("wall_s", "throughput/", "timing/", "memory/", "comm/")


class Notes(SilentDisplay):
    """Keeps what the driver notes."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def note(self, text: str) -> None:
        self.lines.append(text)


def weights(out: Path, step: int = 60) -> dict[str, np.ndarray]:
    """Model and optimiser of a run's checkpoint."""
    tensors = CheckpointStore(out / "checkpoints", 1).load(step).tensors
    return {**tensors["model"], **tensors["optimizer"]}


def assert_same(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> None:
    """Bitwise."""
    assert one.keys() == other.keys()
    assert all(np.array_equal(one[name], other[name]) for name in one)
