"""Compressed gradients between processes: the same numbers as inline, also after a death."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import distml
from distml.runs.checkpoints import CheckpointStore

pytestmark = pytest.mark.usefixtures("shared_ray")

SPEC = {
    "distml": "v1",
    "name": "compressed",
    "task": {"name": "classification", "model": {"name": "mlp", "hidden": [16], "dropout": 0.1}},
    "optimizer": {"name": "sgd", "lr": 0.1, "momentum": 0.9},
    "stop": {"steps": 20},
    "evaluate": {"every": 10},
    "checkpoint": {"every": 8},
    "log": {"every": 10, "to": []},
    "limits": {"heartbeat_s": 0.5, "lost_after_s": 5.0, "start_s": 60.0},
}
CASES = {
    "slices over a process group": (3, {"name": "all_reduce", "compression": {"name": "int8"}}, ()),
    "payloads over a process group, and a death": (
        2, {"name": "all_reduce", "compression": {"name": "topk", "fraction": 0.05}}, ("kill:rank=1,step=13",)),
    "payloads to servers": (
        2, {"name": "parameter_server", "servers": 2, "compression": {"name": "powersgd", "rank": 1}}, ()),
}  # fmt: skip


def tensors(out: Path) -> dict[str, np.ndarray]:
    """Weights, and what every worker has not sent."""
    found = CheckpointStore(out / "checkpoints", 1).load(20).tensors
    kept = {name: array for name, array in found["own"].items() if "/strategy/" in name}
    assert kept
    return {**found["model"], **kept}


def bytes_per_step(out: Path) -> list[float]:
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [row["comm/bytes_per_step"] for row in rows if "comm/bytes_per_step" in row]


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=pytest.mark.slow) if case.startswith("slices") else case for case in CASES]
)
def test_ray_and_inline_give_the_same_bits_and_bytes(tmp_path, case):
    workers, strategy, inject = CASES[case]
    spec = SPEC | {"strategy": strategy, "resources": {"workers": workers}}
    distml.run(spec, out=tmp_path / "inline", runtime="inline")
    result = distml.run(spec, out=tmp_path / "ray", runtime="ray", inject=inject)
    assert (result.status, result.step) == ("done", 20)
    assert result.metrics.get("runtime/restarts", 0) == len(inject)
    one, other = tensors(tmp_path / "inline"), tensors(tmp_path / "ray")
    assert one.keys() == other.keys()
    assert all(np.array_equal(one[name], other[name]) for name in one)
    assert bytes_per_step(tmp_path / "inline") == bytes_per_step(tmp_path / "ray")
    used = json.loads((tmp_path / "ray" / "environment.json").read_text())["transport"]
    assert used.split()[0] == ("object_store" if "servers" in case else "process_group")
