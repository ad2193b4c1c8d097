"""A run that acts, interrupted at a checkpoint and resumed, is the run that was not, bitwise."""

from __future__ import annotations

import pytest
from own.oracle import same, saved
from own.rl_jobs import acting_spec

import distml

ACTS = {"environment": "CartPole-v1", "envs_per_worker": 4, "evaluation": {"episodes": 2, "max_frames": 20}}
PPO = {**ACTS, "name": "ppo", "n_steps": 16, "minibatches": 2, "target_kl": 0.02}
TASKS = {
    "ppo": PPO,
    "ppo, normalised": {**PPO, "normalise": {"observations": True, "rewards": True}},
    "trpo": {**ACTS, "name": "trpo", "n_steps": 8},
    "reinforce": {**ACTS, "name": "reinforce", "baseline": "moving_average", "epochs": 5, "importance_weighting": True},
}


@pytest.mark.parametrize("name", TASKS)
def test_resumed_is_uninterrupted(name, tmp_path):
    optimizer = {"name": "sgd", "lr": 1.0} if name == "trpo" else {"name": "adam", "lr": 0.01}
    spec = acting_spec(TASKS[name], workers=2, steps=15, strategy="all_reduce", optimizer=optimizer,
                       checkpoint={"every": 5}, evaluate={"every": 4})  # fmt: skip
    whole = distml.run(spec, out=tmp_path / "whole", runtime="inline")
    distml.run(spec | {"stop": {"steps": 10}}, out=tmp_path / "parts", runtime="inline")
    parts = distml.run(spec, out=tmp_path / "parts", runtime="inline")
    for kind, tensors in saved(tmp_path / "whole").items():
        assert same(tensors, saved(tmp_path / "parts")[kind])
    assert parts.metrics["rl/frames"] == whole.metrics["rl/frames"] > 0
    assert not same(saved(tmp_path / "whole", 15)["model"], saved(tmp_path / "whole", 10)["model"])
