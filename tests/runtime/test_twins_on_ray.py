"""The small twins of the jobs for GPUs train to their goals: the same strategy, precision and accumulation."""

from __future__ import annotations

import pytest

import distml


def test_all_reduce_in_bf16_with_accumulation(tmp_path):
    result = distml.run("gpt2-124m-cpu", runtime="inline", out=tmp_path / "run")
    assert result.status == "goal_met"
    # The control: a model that does not learn misses it.
    stuck = distml.run(
        "gpt2-124m-cpu", {"optimizer.lr": 0.0, "stop.steps": 20}, runtime="inline", out=tmp_path / "stuck"
    )
    assert stuck.status == "goal_missed"


@pytest.mark.parametrize("name", [
    "gpt2-1.5b-zero2-cpu", pytest.param("llama-8b-zero3-cpu", marks=pytest.mark.slow),
    pytest.param("gpt3-175b-cpu", marks=pytest.mark.slow),
])  # fmt: skip
@pytest.mark.usefixtures("shared_ray")
def test_zero_in_bf16_with_accumulation(tmp_path, name):
    result = distml.run(name, {"log.to": []}, runtime="ray", out=tmp_path / "run")
    assert result.status == "goal_met"
    assert result.metrics["train/tokens"] == 80 * 8 * 32


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt-stdlib-zero2", "bert-stdlib"])
def test_the_jobs_for_a_cpu_reach_their_goals(name, tmp_path):
    assert distml.run(name, out=tmp_path / "run").status == "goal_met"
