"""Tasks that act, on real processes: A3C to its goal, a dead worker, an environment that fails for good."""

from __future__ import annotations

import json
import shutil

import pytest
from own.on_ray import SPEC, Notes, assert_same, weights
from own.oracle import OWN

import distml
from distml.errors import RunError

pytestmark = pytest.mark.usefixtures("shared_ray")

ACTING = {
    **{key: SPEC[key] for key in ("distml", "log", "resources", "limits")},
    "name": "acting",
    "task": {"name": "actor_critic", "environment": "CartPole-v1", "envs_per_worker": 4, "n_steps": 8},
    "strategy": "all_reduce",
    "optimizer": {"name": "adam", "lr": 0.003},
    "stop": {"steps": 40},
    "evaluate": {"every": 1000},
    "checkpoint": {"every": 20},
}
ASYNC = {"name": "parameter_server", "mode": "async"}


def test_a3c_reaches_its_goal_and_says_how(tmp_path):
    """Whose gradient comes first is nobody's choice: about one run in a hundred needs more frames than it has."""
    result = distml.run("a3c-cartpole", out=tmp_path / "run", runtime="ray")
    if result.status == "goal_missed":
        result = distml.run("a3c-cartpole", {"seed": 1}, out=tmp_path / "run", runtime="ray", fresh=True)
    assert result.status == "goal_met"
    assert result.metrics["eval/return_greedy_mean"] >= 475
    assert result.metrics["rl/frames"] <= 200_000
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    last = [row for row in rows if "throughput/frames_per_s" in row][-1]
    assert {"rl/episode_return_mean", "rl/policy_age_mean", "staleness/mean", "train/entropy"} <= last.keys()
    assert result.metrics["test/return_greedy_mean"] > 300
    assert result.model()(*inputs(result))[0].shape == (1, 1, 2)


def inputs(result):
    import torch

    model = result.model()
    return torch.zeros(1, 1, 4), model.initial_state(1), torch.ones(1, 1, dtype=torch.bool)


def test_a2c_on_ray_is_a2c_in_one_process_bitwise(tmp_path):
    distml.run(ACTING, out=tmp_path / "ray", runtime="ray")
    distml.run(ACTING, out=tmp_path / "inline", runtime="inline")
    assert_same(weights(tmp_path / "ray", 40), weights(tmp_path / "inline", 40))


@pytest.mark.parametrize("strategy", [pytest.param("all_reduce", marks=pytest.mark.slow), ASYNC], ids=["sync", "async"])
def test_a_worker_that_dies_while_it_acts_is_replaced(strategy, tmp_path):
    notes = Notes()
    result = distml.run({**ACTING, "strategy": strategy}, out=tmp_path / "run", runtime="ray",
                        inject=["kill:rank=1,step=15"], display=notes)  # fmt: skip
    assert (result.status, result.step) == ("done", 40)
    assert any("rank 1 was lost" in line for line in notes.lines)
    assert result.metrics["rl/frames"] > 0


def test_an_environment_that_fails_for_good_names_worker_step_and_seed(tmp_path):
    """Its environments are begun anew once, four rollouts later it is over."""
    shutil.copy(OWN / "counting.py", tmp_path)
    task = {**ACTING["task"], "environment": {"id": "counting:Counting", "args": {"length": 50, "raises_at": 30}}}
    spec = {**ACTING, "task": task, "limits": {**ACTING["limits"], "max_restarts": 1}}
    (tmp_path / "failing.yaml").write_text(json.dumps(spec))
    with pytest.raises(RunError, match=r"rank \d, stream, step 6: .*worker \d: .*seed \d+.*the motor is hot") as caught:
        distml.run(tmp_path / "failing.yaml", out=tmp_path / "run", runtime="ray")
    assert caught.value.exit_code == 3
    assert "max_restarts: 1" in str(caught.value)
