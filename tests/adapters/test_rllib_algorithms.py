"""Other algorithms of RLlib for an iteration or two, the shipped job to its goal, and the command as a process."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import gymnasium as gym
import pyarrow
import pyarrow.parquet
import pytest

import distml

pytestmark = pytest.mark.slow

LIMIT_S = 180.0
REPLAY = {"num_steps_sampled_before_learning_starts": 50, "train_batch_size_per_learner": 16,
          "rollout_fragment_length": 4, "min_sample_timesteps_per_iteration": 100}  # fmt: skip
ASYNCHRONOUS = {"num_env_runners": 1, "num_envs_per_env_runner": 2, "num_learners": 0, "rollout_fragment_length": 50,
                "train_batch_size_per_learner": 100, "min_time_s_per_iteration": 1}  # fmt: skip
ONLINE = {
    "IMPALA": ("CartPole-v1", ASYNCHRONOUS, {"frames": 400}),
    "APPO": ("CartPole-v1", ASYNCHRONOUS, {"frames": 400}),
    "DQN": ("CartPole-v1", REPLAY, {"steps": 2}),
    "SAC": ("Pendulum-v1", REPLAY, {"steps": 2}),
}


@pytest.mark.parametrize("name", ONLINE)
def test_an_algorithm_trains_and_goes_on(name, train, spec):
    spec["algorithm"], spec["environment"] = name, ONLINE[name][0]
    spec["config"], spec["stop"] = ONLINE[name][1:]
    result = train(spec)
    assert result.status == "done"
    assert result.metrics["rl/frames"] > 0
    assert "eval/return_mean" in result.metrics
    frames = result.metrics["rl/frames"]
    again = train(spec, {"stop": {"frames": frames + 50}})
    assert again.step > result.step
    assert frames + 50 <= again.metrics["rl/frames"] < frames + 5_000


@pytest.fixture
def recorded(tmp_path):
    """Twenty CartPole episodes of a controller that balances it, as a table of frames."""
    env, frames = gym.make("CartPole-v1"), []
    for episode in range(20):
        observation, _ = env.reset(seed=episode)
        for t in range(500):
            action = int(observation[2] + 0.5 * observation[3] > 0)
            following, reward, terminated, truncated, _ = env.step(action)
            frames.append({
                "eps_id": str(episode), "agent_id": "default_agent", "module_id": "default_policy", "t": t,
                "obs": observation.tolist(), "actions": action, "rewards": float(reward),
                "new_obs": following.tolist(), "terminateds": terminated, "truncateds": truncated,
            })  # fmt: skip
            observation = following
            if terminated or truncated:
                break
    folder = tmp_path / "recorded"
    folder.mkdir()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(frames), folder / "frames.parquet")
    return folder


def test_behavioural_cloning_learns_from_recorded_episodes(train, spec, recorded):
    spec["algorithm"] = "BC"
    spec["config"] = {"input_": str(recorded), "dataset_num_iters_per_learner": 1, "train_batch_size_per_learner": 256,
                      "lr": 3.0e-3}  # fmt: skip
    result = train(spec, {"stop.steps": 30, "evaluate.every": 30})
    assert result.status == "done"
    assert "rl/frames" not in result.metrics
    assert result.metrics["train/loss"] < 0.6  # 0.693 is guessing


def test_the_shipped_job_meets_its_goal(shared_ray, tmp_path):
    result = distml.run("rllib-ppo-cartpole", out=tmp_path / "run")
    assert result.status == "goal_met"
    assert result.metrics["rl/frames"] < 200_000


def test_the_command_is_interrupted_and_goes_on(tmp_path):
    """A private Ray, as a user has it; only this process's id is ever signalled."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    command = [sys.executable, "-m", "distml", "run", "rllib-ppo-cartpole", "--out", str(tmp_path / "run")]
    first = subprocess.Popen([*command, "--set", "stop={steps: 1000}"], env=environment, stdout=subprocess.PIPE)
    deadline, lines = time.monotonic() + LIMIT_S, tmp_path / "run" / "metrics.jsonl"
    while not (lines.exists() and lines.read_text().count("\n") >= 2):
        assert first.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.1)
    first.send_signal(signal.SIGTERM)
    first.communicate(timeout=LIMIT_S)
    assert first.returncode == 130
    step = json.loads((tmp_path / "run" / "result.json").read_text())["step"]
    second = subprocess.run([*command, "--set", f"stop={{steps: {step + 1}}}"], env=environment, capture_output=True,
                            text=True, timeout=LIMIT_S, check=False)  # fmt: skip
    assert second.returncode == 0
    assert f"resuming from step {step}" in second.stdout
    assert second.stderr == ""


def test_a_cluster_that_is_not_there_is_named(spec, tmp_path):
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    command = [sys.executable, "-m", "distml", "run", "rllib-ppo-cartpole", "--out", str(tmp_path / "run")]
    found = subprocess.run([*command, "--address", "127.0.0.1:1"], env=environment, capture_output=True, text=True,
                           timeout=LIMIT_S, check=False)  # fmt: skip
    assert found.returncode == 2
    assert "no Ray cluster at '127.0.0.1:1'" in found.stderr
