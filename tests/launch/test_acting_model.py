"""A trained policy in the user's hands acts as the run's own evaluation does, whatever it normalises with."""

from __future__ import annotations

import pytest
import torch
from own.rl_jobs import acting_spec

from distml.cli import main
from distml.launch.evaluate import load_model
from distml.launch.run import run
from distml.rl.evaluation import acting, play_by

EPISODES = 3
TASK = {"name": "actor_critic", "environment": "Pendulum-v1", "envs_per_worker": 4, "n_steps": 16,
        "normalise": {"observations": True}, "evaluation": {"episodes": EPISODES, "modes": ["greedy"]}}  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return run(acting_spec(TASK, steps=8), out=tmp_path_factory.mktemp("runs") / "run")


def greedy_return(policy, environment) -> float:
    """Of the test split's episodes, played with the policy as it is."""
    returns, _ = play_by(acting(policy, EPISODES, torch.device("cpu")), environment, 27_000, "test", range(EPISODES))
    return float(returns.mean())


def test_the_model_of_a_result_normalises_with_what_was_seen(finished):
    policy, environment = finished.model(), load_model(finished.directory).task.spec.environment
    moments = policy.observation_moments
    assert float(moments.count) > 0
    assert greedy_return(policy, environment) == pytest.approx(finished.metrics["test/return_greedy_mean"], rel=1e-6)
    moments.frozen_mean.zero_()  # the control: as they are before anything is seen
    moments.frozen_scale.fill_(1.0)
    assert greedy_return(policy, environment) != pytest.approx(finished.metrics["test/return_greedy_mean"], rel=1e-6)


def test_a_task_that_acts_has_no_train_split(finished, capsys):
    assert main(["evaluate", str(finished.directory), "--split", "train"]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert "task actor_critic acts and has no train split; known: validation, test" in err
    assert main(["evaluate", str(finished.directory), "--split", "test"]) == 0
    assert capsys.readouterr().out.split()[-1] == repr(finished.metrics["test/return_greedy_mean"])
