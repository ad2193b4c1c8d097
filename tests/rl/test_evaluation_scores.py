"""Evaluation's scores are the game's own, whatever training's wrappers make of them."""

from __future__ import annotations

import numpy as np
import pytest
from own.oracle import job_of, spec_of

from distml.rl.environments import Environments
from distml.rl.evaluation import play_by, unclipped
from distml.spec.rl import EnvironmentSpec
from distml.tasks.base import Part, Progress
from distml.tasks.build import build_task

CLIP = {"name": "ClipReward", "args": {"max_reward": 1.0}}
FLATTEN = {"name": "FlattenObservation"}


def environment_of(name: str, **more) -> EnvironmentSpec:
    return EnvironmentSpec.model_validate({"id": name, **more})


def zeros(observations, resets):
    return np.zeros(len(observations), np.int64)


def test_wrappers_of_rewards_are_left_out_and_others_stay():
    limit = {"name": "TimeLimit", "args": {"max_episode_steps": 2}}
    environment = environment_of("own.counting:Counting", wrappers=[CLIP, limit])
    returns, lengths = play_by(zeros, environment, 100, "test", range(3))
    assert (returns.tolist(), lengths.tolist()) == ([3.0] * 3, [2.0] * 3)  # 1 + 2, cut before the third step
    clipped = Environments(environment, [1])
    clipped.reset()
    rewards = [clipped.step(np.zeros(1, np.int64)).rewards[0] for _ in range(2)]
    assert rewards == [1.0, 1.0]  # control: while it is trained


def test_a_task_with_a_table_is_scored_so_too():
    environment = {"id": "own.counting:CountingStates", "wrappers": [CLIP]}
    spec = spec_of({"name": "sarsa", "environment": environment, "evaluation": {"episodes": 2}})
    del spec["batch_size"]
    task = build_task(job_of(spec))
    means = task.evaluate(task.build_model(), Part(0, 1, 0, "validation"), Progress())
    assert means["return_greedy_mean"].value == 6.0


@pytest.mark.parametrize(
    "more",
    [{"vectorization": "sync"}, {"max_episode_steps": 5}, {"wrappers": [FLATTEN]}, {"wrappers": [CLIP]}],
    ids=["sync", "limit", "wrapper", "reward wrapper"],
)
def test_games_in_single_environments_take_no_arguments_of_the_vector_form(more):
    """And give what they give in training: a policy must be able to read it."""
    pytest.importorskip("ale_py", reason="needs the extra 'atari'")
    environment = environment_of("ALE/Pong-v5", **more)
    trained, scored = Environments(environment, [1]), Environments(unclipped(environment), [1], together=False)
    assert scored.observation_space == trained.observation_space
    own = unclipped(environment_of("ALE/Pong-v5"))
    assert own.args == {"reward_clipping": False, "episodic_life": False}  # control: where there is one
