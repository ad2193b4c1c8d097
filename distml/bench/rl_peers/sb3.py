"""A peer of `distml bench rl`: Stable-Baselines3's A2C and PPO.

Usage: python -m distml.bench.rl_peers.sb3 CONFIG. One process and one torch thread, which for networks this small is
quicker than the default. Settings as RL Baselines3 Zoo publishes them (hyperparams/a2c.yml, ppo.yml); A2C with 16
environments, with which it is quicker than with the 8 given there, and just as good.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from stable_baselines3 import A2C, PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.sb2_compat.rmsprop_tf_like import RMSpropTFLike
from stable_baselines3.common.vec_env import VecEnv
from torch import nn

from distml.bench.rl_kept import RETURN, Arrays, Keeper, as_arrays
from distml.bench.rl_peers import configuration

ALGORITHMS = {"a2c": A2C, "ppo": PPO}


def falling(start: float) -> Callable[[float], float]:
    """From `start` to 0 over the budget."""
    return lambda remaining: remaining * start


NUM_ENVS = {("a2c", "CartPole-v1"): 16, ("ppo", "CartPole-v1"): 8, ("ppo", "Pendulum-v1"): 4, ("a2c", "Pong"): 16}
SETTINGS: dict[tuple[str, str], dict[str, Any]] = {
    ("a2c", "CartPole-v1"): {"ent_coef": 0.0},
    ("ppo", "CartPole-v1"): {"n_steps": 32, "batch_size": 256, "gae_lambda": 0.8, "gamma": 0.98, "n_epochs": 20,
                             "ent_coef": 0.0, "learning_rate": falling(0.001), "clip_range": falling(0.2)},
    ("ppo", "Pendulum-v1"): {"n_steps": 1024, "gae_lambda": 0.95, "gamma": 0.9, "n_epochs": 10, "ent_coef": 0.0,
                             "learning_rate": 1e-3, "clip_range": 0.2, "use_sde": True, "sde_sample_freq": 4},
    ("a2c", "Pong"): {"ent_coef": 0.01, "vf_coef": 0.25,
                      "policy_kwargs": {"optimizer_class": RMSpropTFLike, "optimizer_kwargs": {"eps": 1e-5}}},
}  # fmt: skip


class Marks(BaseCallback):  # type: ignore[misc, unused-ignore]
    """Offers the weights between updates.

    Args:
        keeper: takes them.
        copy: of what is kept of a model.
    """

    def __init__(self, keeper: Keeper, copy: Callable[[Any], Arrays]) -> None:
        super().__init__()
        self.keeper, self.copy = keeper, copy

    def _on_training_start(self) -> None:
        self.keeper.start()

    def _on_rollout_start(self) -> None:
        self.keeper.offer(self.num_timesteps, lambda: self.copy(self.model))

    def _on_step(self) -> bool:
        return True

    def _on_training_end(self) -> None:
        self._on_rollout_start()


class VectorEnvironments(VecEnv):  # type: ignore[misc, unused-ignore]
    """Gymnasium's vector environments as Stable-Baselines3's: they begin anew in the step in which they end."""

    def __init__(self, environments: gym.vector.VectorEnv[Any, Any, Any]) -> None:
        self.environments = environments
        self.returns = np.zeros(environments.num_envs)
        self.lengths = np.zeros(environments.num_envs, int)
        super().__init__(environments.num_envs, environments.single_observation_space, environments.single_action_space)

    def reset(self) -> Any:
        observations, _ = self.environments.reset(seed=self._seeds[0])
        return observations

    def step_async(self, actions: Any) -> None:
        self.actions = actions

    def step_wait(self) -> Any:
        observations, rewards, terminated, truncated, further = self.environments.step(self.actions)
        self.returns += rewards
        self.lengths += 1
        infos: list[dict[str, Any]] = [{} for _ in range(self.num_envs)]
        for index in np.flatnonzero(terminated | truncated):
            episode = {"r": float(self.returns[index]), "l": int(self.lengths[index])}
            infos[index] = {"episode": episode, "terminal_observation": further["final_obs"][index],
                            "TimeLimit.truncated": bool(truncated[index] and not terminated[index])}  # fmt: skip
            self.returns[index] = self.lengths[index] = 0
        return observations, rewards, terminated | truncated, infos

    def close(self) -> None:
        self.environments.close()

    def get_attr(self, attr_name: str, indices: Any = None) -> list[Any]:
        return [None] * self.num_envs

    def set_attr(self, attr_name: str, value: Any, indices: Any = None) -> None:
        raise NotImplementedError

    def env_method(self, method_name: str, *args: Any, indices: Any = None, **kwargs: Any) -> list[Any]:
        raise NotImplementedError

    def env_is_wrapped(self, wrapper_class: Any, indices: Any = None) -> list[bool]:
        return [False] * self.num_envs


def layers(model: Any) -> Arrays:
    """The policy network's."""
    policy = model.policy
    linear = [module for module in policy.mlp_extractor.policy_net if isinstance(module, nn.Linear)]
    return as_arrays([(one.weight.detach(), one.bias.detach()) for one in (*linear, policy.action_net)])


def training_return(model: Any) -> Arrays:
    """The mean return of the last 100 training episodes."""
    found: Sequence[float] = [episode["r"] for episode in model.ep_info_buffer]
    return {RETURN: np.array(np.mean(found) if found else np.nan)}


def atari(args: dict[str, Any], num_envs: int) -> VectorEnvironments:
    """ALE's own vector environments, with the preprocessing that our side has."""
    import ale_py

    gym.register_envs(ale_py)
    made = gym.make_vec(**args, num_envs=num_envs, autoreset_mode=gym.vector.AutoresetMode.SAME_STEP)
    return VectorEnvironments(made)


def main(config: dict[str, Any]) -> None:
    """Train for as many frames as are asked for."""
    torch.set_num_threads(1)
    algorithm, environment, images = config["algorithm"], config["environment"], bool(config.get("atari"))
    which = algorithm, "Pong" if images else environment
    environments = atari(config["atari"], NUM_ENVS[which]) if images else make_vec_env(environment, NUM_ENVS[which])
    policy = "CnnPolicy" if images else "MlpPolicy"
    model = ALGORITHMS[algorithm](policy, environments, seed=config["seed"], device="cpu", **SETTINGS[which])
    keeper = Keeper(config["every"])
    model.learn(config["frames"], callback=Marks(keeper, training_return if images else layers))
    keeper.save(Path(config["path"]), "tanh")


if __name__ == "__main__":
    main(configuration())
