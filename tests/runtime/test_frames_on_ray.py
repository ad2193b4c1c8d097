"""Environment steps on the wires between processes: what a run counts is what its workers have reported."""

from __future__ import annotations

import pytest
from own.oracle import OWN, spec_of
from own.stepping import frames_of

import distml
from distml.runs.checkpoints import CheckpointStore

pytestmark = pytest.mark.usefixtures("shared_ray")
LIMITS = {"heartbeat_s": 0.5, "lost_after_s": 5.0, "start_s": 60.0}
WAYS = {
    "gloo": ("process_group", {"name": "all_reduce"}),  # DDP where it is between hosts
    "server": ("object_store", {"name": "parameter_server", "servers": 2}),
    "async": ("object_store", {"name": "parameter_server", "mode": "async"}),
    "shared": ("shared_memory", {"name": "all_reduce"}),
    "shared async": ("shared_memory", {"name": "parameter_server", "mode": "async"}),
}


@pytest.mark.parametrize(
    "way", [pytest.param(way, marks=pytest.mark.slow) if way in ("gloo", "shared async") else way for way in WAYS]
)
def test_frames_add_up(way, tmp_path, monkeypatch):
    monkeypatch.chdir(OWN)
    transport, strategy = WAYS[way]
    task = "apart_steps:ApartSteps" if way == "gloo" else "stepping:Stepping"
    spec = spec_of(task, workers=2, steps=20, strategy=strategy, limits=LIMITS, transport=transport,
                   checkpoint={"every": 10})  # fmt: skip
    result = distml.run(spec, out=tmp_path, runtime="ray")
    clock = CheckpointStore(tmp_path / "checkpoints", 1).load(result.step).state["clock"]
    applied = dict(clock["contributed"]) if "contributed" in clock else {0: 20 * 6, 1: 20 * 6}
    by_hand = sum(frames_of(rank, number) for rank, rows in applied.items() for number in range(1, round(rows / 6) + 1))
    assert clock["frames"] == by_hand > 0
    assert result.metrics["rl/frames"] == by_hand
