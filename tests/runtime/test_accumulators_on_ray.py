"""What workers count is there once and only once also where one of them dies and another takes its place."""

from __future__ import annotations

import pytest
import torch
from own.counted import moments, rows_of
from own.on_ray import Notes
from own.oracle import OWN, spec_of

import distml
from distml.runs.checkpoints import CheckpointStore

pytestmark = pytest.mark.usefixtures("shared_ray")
KILL = ("kill:rank=1,step=130",)
LIMITS = {"heartbeat_s": 0.5, "lost_after_s": 5.0, "start_s": 60.0}


@pytest.mark.parametrize(
    ("transport", "inject"),
    [
        ("shared_memory", KILL),
        ("object_store", ()),
        pytest.param("object_store", KILL, marks=pytest.mark.slow),
        pytest.param("shared_memory", (), marks=pytest.mark.slow),
    ],
)
def test_asynchronous_workers(transport, inject, tmp_path, monkeypatch):
    monkeypatch.chdir(OWN)
    strategy = {"name": "parameter_server", "mode": "async"}
    spec = spec_of("counted:Counted", workers=2, steps=400, strategy=strategy, transport=transport, limits=LIMITS,
                   optimizer={"name": "sgd", "lr": 1e-4}, evaluate={"every": 50},
                   checkpoint={"every": 100})  # fmt: skip
    notes = Notes()
    distml.run(spec, out=tmp_path, runtime="ray", inject=inject, display=notes)
    checkpoint = CheckpointStore(tmp_path / "checkpoints", 1).load(400)
    model, contributed = checkpoint.tensors["model"], dict(checkpoint.state["clock"]["contributed"])
    batches = [round(number) for number in model["seen.batches"].tolist()[:2]]
    assert batches == [contributed.get(rank, 0.0) / (2 + rank) for rank in range(2)]
    assert sum(batches) == 400
    assert model["seen.count"] == sum(contributed.values())
    assert len([line for line in notes.lines if "was lost" in line]) == len(inject)
    if not inject:  # else numbers come again
        count, mean, m2 = moments(
            torch.cat([rows_of(rank, n) for rank, total in enumerate(batches) for n in range(1, total + 1)])
        )
        assert float(model["seen.count"][0]) == count
        assert abs(model["seen.mean"] - mean.numpy()).max() <= 1e-12
        assert abs(model["seen.m2"] / m2.numpy() - 1).max() <= 1e-12
