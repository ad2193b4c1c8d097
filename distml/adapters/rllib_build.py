"""From a spec to an algorithm of RLlib, and greedy episodes of it.

Environments are made by `make_environment`, registered with RLlib under the spec's id, so that a user's own class and
Gymnasium's ids go the same way. Seeds: training's lie from 2^30 on, as everywhere in distml, evaluations' below it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from ray.rllib.algorithms.algorithm import Algorithm
from ray.rllib.algorithms.algorithm_config import AlgorithmConfig
from ray.rllib.algorithms.registry import ALGORITHMS
from ray.tune.registry import register_env

from distml.rl.environments import TRAINING_SEEDS, make_one
from distml.spec.rl import EnvironmentSpec
from distml.spec.rllib import OFFLINE, RLlibSpec
from distml.tasks.data import mix
from distml.tasks.sources import SourceTree

NEVER = 10**9  # iterations: evaluations are distml's, but without an interval RLlib makes no environments for them
EVALUATION, TEST = 1, 2  # what is mixed into the seeds of evaluations and of `distml evaluate --split test`
WORKERS = 2_000_000  # RLlib adds a worker's index to a seed, and a million for evaluations
EPISODES = {"episode_return_mean": "rl/episode_return_mean", "episode_len_mean": "rl/episode_length_mean"}
LOSSES = {"total_loss": "loss", "default_optimizer_learning_rate": "lr"}  # RLlib's names that have one in distml
BOOKKEEPING = ("timer", "throughput", "connector", "_lifetime", "weights_seq_no", "num_trainable", "num_non_trainable")
DATA_CPUS = 2  # Ray Data reads recorded episodes in tasks that reserve CPUs of their own


def make_environment(context: dict[str, Any], *, spec: EnvironmentSpec, sources: SourceTree) -> gym.Env[Any, Any]:
    """One environment, in whatever process RLlib wants it."""
    sources.install()
    env = make_one(spec)
    sources.mark_imported()
    return env


def make_config(
    job: RLlibSpec, sources: SourceTree, *, start: int = 0, evaluation: int = EVALUATION
) -> AlgorithmConfig:
    """The algorithm's config, every key given through the builder method that knows it.

    Args:
        start: the iteration that the run goes on from: environments begin anew there, on other seeds than before.
        evaluation: which episodes an evaluation is of.

    Raises:
        Exception: whatever RLlib's builder methods find wrong.
    """
    register_env(job.environment.id, functools.partial(make_environment, spec=job.environment, sources=sources))
    config: AlgorithmConfig = ALGORITHMS[job.algorithm]()[1]
    config.environment(env=job.environment.id, is_atari=job.environment.id.startswith("ALE/"))
    # With whole episodes RLlib's env runners take their seed again at every call: all would start in the same states.
    seeded = job.config.get("batch_mode") != "complete_episodes"
    seed = TRAINING_SEEDS + mix(job.seed, start, 0) % TRAINING_SEEDS if seeded else None
    config.debugging(log_sys_usage=False, seed=seed)
    for key, value in job.config.items():
        method = job.keys[key].split()[0]
        getattr(config, method)(**{key: value})
    config.evaluation(
        evaluation_interval=NEVER,
        evaluation_num_env_runners=0,
        evaluation_config=AlgorithmConfig.overrides(
            explore=False,
            num_envs_per_env_runner=job.evaluate.episodes,
            create_local_env_runner=True,
            seed=mix(job.seed, evaluation) % (TRAINING_SEEDS - WORKERS),
            input_="sampler",
            output=None,
        ),
    )
    return config


def asked_for(job: RLlibSpec, config: AlgorithmConfig) -> tuple[int, float]:
    """CPUs and GPUs that the algorithm's processes reserve."""
    bundles = config.algo_class.default_resource_request(config).bundles
    cpus = math.ceil(sum(bundle.get("CPU", 0) for bundle in bundles))
    return cpus + (DATA_CPUS if job.algorithm in OFFLINE else 0), sum(bundle.get("GPU", 0) for bundle in bundles)


def greedy_episodes(algorithm: Algorithm, max_frames: int) -> dict[str, float]:
    """Mean return and length of one greedy episode in each evaluation environment, the same ones at every call.

    Each environment's first episode counts and no other: with the first to end of several, short ones would count more.

    Args:
        max_frames: of an episode; a longer one counts as it is then.
    """
    group = algorithm.eval_env_runner_group
    group.sync_weights(from_worker_or_learner_group=algorithm.learner_group, inference_only=True)
    group.sync_env_runner_states(
        config=algorithm.evaluation_config,
        from_worker=algorithm.env_runner,
        env_to_module=algorithm.env_to_module_connector,
        module_to_env=algorithm.module_to_env_connector,
    )
    runner = group.local_env_runner
    runner.make_env()  # only new environments take the seed again
    count = runner.num_envs
    chunks = runner.sample(num_timesteps=count, explore=False, force_reset=True)  # one frame of each
    returns = {chunk.id_: float(chunk.get_return()) for chunk in chunks}
    lengths = {chunk.id_: len(chunk) for chunk in chunks}
    running = {chunk.id_ for chunk in chunks if not chunk.is_done}
    while running and max(lengths.values()) < max_frames:
        for chunk in runner.sample(num_timesteps=count * min(64, max_frames), explore=False):
            if chunk.id_ in running:
                returns[chunk.id_] += float(chunk.get_return())
                lengths[chunk.id_] += len(chunk)
                running -= {chunk.id_} if chunk.is_done else set()
    runner.get_metrics()  # RLlib keeps episodes until somebody asks
    return {"return_mean": sum(returns.values()) / count, "episode_length_mean": sum(lengths.values()) / count}


def training_metrics(result: Mapping[str, Any]) -> dict[str, float]:
    """What distml reports of an iteration's result: episodes as `rl/…`, learners' numbers as `train/…`.

    Numbers of the one policy stand without its name; timers, throughputs and counters of RLlib's own are left out.
    """
    found = {}
    for name, ours in EPISODES.items():
        value = result.get("env_runners", {}).get(name)
        if value is not None:
            found[ours] = float(value)
    for module, values in result.get("learners", {}).items():
        if module != "__all_modules__":
            prefix = "" if module == "default_policy" else f"{module}/"
            for name, value in _numbers(values):
                found[f"train/{prefix}{LOSSES.get(name, name)}"] = value
    return found


def _numbers(values: Mapping[str, Any], around: str = "") -> Iterator[tuple[str, float]]:
    for name, value in values.items():
        if any(word in name for word in BOOKKEEPING):
            continue
        if isinstance(value, Mapping):
            yield from _numbers(value, f"{around}{name}/")
        elif isinstance(value, int | float | np.number):
            yield f"{around}{name}", float(value)


def main_threads(config: AlgorithmConfig) -> None:
    """As many torch threads in this process as CPUs are reserved for it: local env runners and learners run here."""
    torch.set_num_threads(max(1, int(config.num_cpus_for_main_process)))
