"""local_sgd on Ray: the inline run's bits, also after a death, and the shipped job's goal."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from own import on_ray
from own.on_ray import TIMES, Notes

import distml
from distml.runs.checkpoints import CheckpointStore

pytestmark = pytest.mark.usefixtures("shared_ray")

ROUNDS = {"name": "local_sgd", "inner_steps": 4, "outer": {"name": "nesterov", "lr": 0.7, "momentum": 0.8}}
SPEC = {**on_ray.SPEC, "strategy": ROUNDS, "stop": {"steps": 58}}


def trained(out: Path) -> tuple[dict[str, np.ndarray], list[dict]]:
    tensors = CheckpointStore(out / "checkpoints", 1).load(58).tensors
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    rows = [{k: v for k, v in line.items() if not k.startswith(TIMES)} for line in lines]
    return {**tensors["model"], **tensors["optimizer"], **tensors["own"]}, rows


@pytest.mark.parametrize(
    ("transport", "hidden"),
    [
        pytest.param("shared_memory", 1024, marks=pytest.mark.slow),
        ("process_group", 16),
    ],
)
def test_ray_and_inline_give_the_same_numbers_also_after_a_death(tmp_path, transport, hidden):
    notes = Notes()
    for runtime, inject in (("inline", ()), ("ray", ("kill:rank=1,step=38",))):
        changes = {"transport": transport, "task.model.hidden": [hidden]}  # 1024: more than a message board holds
        result = distml.run(SPEC, changes, out=tmp_path / runtime, runtime=runtime, inject=inject, display=notes)
        assert (result.status, result.step) == ("done", 58)
    assert [line for line in notes.lines if line.startswith("rank 1 was lost") and "from step 32" in line]
    (inline, inline_rows), (ray, ray_rows) = trained(tmp_path / "inline"), trained(tmp_path / "ray")
    assert inline.keys() == ray.keys()
    assert all(np.array_equal(inline[name], ray[name]) for name in inline)
    assert any(name.startswith("outer_momentum/") for name in ray)
    assert any("inner" in name for name in ray)
    assert inline_rows == ray_rows


def test_the_shipped_job_reaches_its_goal(tmp_path):
    result = distml.run("digits-local-sgd", out=tmp_path / "run", runtime="ray")
    assert result.status == "goal_met"
    assert result.metrics["eval/accuracy"] >= 0.96
    assert 0.93 <= result.metrics["test/accuracy"] <= 1.0
