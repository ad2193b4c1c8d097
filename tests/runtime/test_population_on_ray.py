"""Populations on a real Ray: the same as in one process, and what survives deaths."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from own.populations import OWN, lineage, per_member, toy

from distml.launch.run import Result, run
from distml.runs.checkpoints import CheckpointStore

FOUR = {"members": 4, "every": 5, "base__stop__steps": 20, "exploit": {"name": "truncation", "fraction": 0.34},
        "base__optimizer": {"name": "adam", "lr": 0.02}}  # fmt: skip


def go(spec: dict[str, Any], out: Path, monkeypatch: pytest.MonkeyPatch, **more: Any) -> Result:
    monkeypatch.chdir(OWN)
    return run(spec, out=out, **more)


def model(out: Path, name: str) -> Any:
    checkpoint = CheckpointStore(out / f"members/{name}/checkpoints", 1).newest_good(print)
    assert checkpoint is not None
    return checkpoint.model()["theta"]


def test_synchronous_on_ray_is_bitwise_what_it_is_inline(
    shared_ray: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    go(toy(**FOUR), tmp_path / "inline", monkeypatch, runtime="inline")
    go(toy(**FOUR, max_concurrent=2), tmp_path / "ray", monkeypatch, address=shared_ray)
    inline, on_ray = (per_member(lineage(tmp_path / name)) for name in ("inline", "ray"))
    assert inline == on_ray
    assert any(event["event"] == "copy" for events in on_ray.values() for event in events)
    for name in inline:
        np.testing.assert_array_equal(model(tmp_path / "inline", name), model(tmp_path / "ray", name))


def test_a_killed_member_is_replaced(shared_ray: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = toy(**FOUR, max_concurrent=2, synchronous=False)
    result = go(spec, tmp_path / "run", monkeypatch, address=shared_ray, inject=["kill:member=2,step=7"])
    assert result.status == "done"
    events = per_member(lineage(tmp_path / "run"))
    (event,) = [event for event in events["02"] if event["event"] == "replace"]
    assert "killed by a signal" in event["cause"]
    assert event["equal"]
    for name, history in events.items():
        assert (history[-1]["event"], history[-1]["step"]) == ("finish", 20)
        rows = [json.loads(line)["step"] for line in (tmp_path / f"run/members/{name}/metrics.jsonl").open()]
        assert rows == sorted(rows)
