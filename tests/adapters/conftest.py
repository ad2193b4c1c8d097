"""A small real Ray for each file of tests, and the smallest run of RLlib's PPO on it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from own.small_ray import small_ray

import distml
from distml.launch.run import Result

SPEC: dict[str, Any] = {
    "distml": "v1",
    "kind": "rllib",
    "name": "tiny",
    "algorithm": "PPO",
    "environment": "CartPole-v1",
    "config": {
        "num_env_runners": 0,
        "num_envs_per_env_runner": 2,
        "train_batch_size_per_learner": 128,
        "minibatch_size": 64,
        "num_epochs": 1,
        "model_config": {"fcnet_hiddens": [8]},
    },
    "stop": {"steps": 2},
    "evaluate": {"every": 2, "episodes": 3},
    "log": {"to": []},
}


@pytest.fixture(scope="module")
def shared_ray() -> Iterator[str]:
    """The address of a running Ray with four logical CPUs."""
    yield from small_ray()


@pytest.fixture
def spec() -> dict[str, Any]:
    """What `train` runs."""
    return {**SPEC, "config": dict(SPEC["config"])}


@pytest.fixture
def train(shared_ray: str, tmp_path: Path) -> Callable[..., Result]:
    """Run the small job in `tmp_path/run`."""

    def run(spec: dict[str, Any] = SPEC, overrides: object = (), **more: Any) -> Result:
        return distml.run(spec, overrides, out=tmp_path / "run", **more)

    return run
