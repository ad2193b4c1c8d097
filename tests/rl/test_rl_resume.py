"""Interrupted and resumed is uninterrupted, bit by bit: environments begin anew at checkpoints in both."""

from __future__ import annotations

import numpy as np
import pytest
from own.on_ray import assert_same, weights

from distml import run
from distml.runs.checkpoints import CheckpointStore

TASKS = {
    "actor_critic": {"name": "actor_critic", "n_steps": 5},
    "recurrent": {"name": "actor_critic", "n_steps": 5, "policy": {"name": "lstm", "hidden": [8], "units": 8}},
    "normalised": {"name": "actor_critic", "n_steps": 5, "normalise": {"observations": True, "rewards": True}},
    "ppo": {"name": "ppo", "n_steps": 16, "epochs": 5, "minibatches": 2},
    "ppo that leaves rollouts": {"name": "ppo", "n_steps": 16, "minibatches": 2, "target_kl": 0.02,
                                 "normalise": {"observations": True, "rewards": True}},
    "trpo": {"name": "trpo", "n_steps": 8},
    "reinforce": {"name": "reinforce"},
    "reinforce off-policy": {"name": "reinforce", "baseline": "moving_average", "epochs": 5,
                             "importance_weighting": True},
}  # fmt: skip


def spec(task, **changes):
    """Two workers; evaluations between the checkpoints and at them."""
    optimizer = {"name": "sgd", "lr": 1.0} if task["name"] == "trpo" else {"name": "adam", "lr": 0.01}
    return {
        "distml": "v1", "name": "resumed", "strategy": "all_reduce", "optimizer": optimizer,
        "task": {"environment": "CartPole-v1", "envs_per_worker": 4,
                 "evaluation": {"episodes": 2, "max_frames": 50}, **task},
        "stop": {"steps": 20}, "evaluate": {"every": 4}, "checkpoint": {"every": 10}, "log": {"every": 5, "to": []},
        "resources": {"workers": 2}, **changes,
    }  # fmt: skip


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name == "trpo" else name for name in TASKS]
)
def test_a_resumed_run_is_the_uninterrupted_one(name, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run(spec(TASKS[name]), out=whole, runtime="inline")
    run(spec(TASKS[name]), {"stop.steps": 10}, out=parts, runtime="inline")
    after_ten = weights(parts, 10)
    resumed = run(spec(TASKS[name]), out=parts, runtime="inline")
    assert_same(weights(whole, 20), weights(parts, 20))
    assert not all(np.array_equal(after_ten[key], value) for key, value in weights(parts, 20).items())
    frames = [CheckpointStore(path / "checkpoints", 1).load(20).state["clock"]["frames"] for path in (whole, parts)]
    assert frames[0] == frames[1] > 0
    assert resumed.metrics["rl/frames"] == frames[0]


def test_without_beginning_anew_they_would_differ(tmp_path, monkeypatch):
    """The control: a stream that goes on over the checkpoint of the uninterrupted run."""
    from distml.rl.on_policy import ActingStream

    run(spec(TASKS["actor_critic"]), {"stop.steps": 10}, out=tmp_path / "parts", runtime="inline")
    run(spec(TASKS["actor_critic"]), out=tmp_path / "parts", runtime="inline")
    monkeypatch.setattr(ActingStream, "state", lambda self: {})
    run(spec(TASKS["actor_critic"]), out=tmp_path / "whole", runtime="inline")
    one, other = weights(tmp_path / "whole", 20), weights(tmp_path / "parts", 20)
    assert not all(np.array_equal(one[key], value) for key, value in other.items())
