"""A peer of `distml bench rl`: RLlib's IMPALA and PPO.

Usage: python -m distml.bench.rl_peers.rllib CONFIG. Two runners with eight environments each, and the learner in the
driver, on a Ray of its own. Settings as Ray publishes them (rllib/tuned_examples: cartpole_impala.py, cartpole_ppo.py).
It reports as often as weights are kept, not every few seconds as by default.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

from distml.bench.rl_kept import Arrays, Keeper, as_arrays
from distml.bench.rl_peers import configuration

SETTINGS: dict[str, dict[str, Any]] = {
    "impala": {"train_batch_size_per_learner": 500, "grad_clip": 40.0, "grad_clip_by": "global_norm", "lr": 0.0005,
               "vf_loss_coeff": 0.05, "entropy_coeff": 0.0},
    "ppo": {"lr": 0.0003, "num_epochs": 6, "vf_loss_coeff": 0.01},
}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "impala": {"vf_share_layers": True},
    "ppo": {"fcnet_hiddens": [32], "fcnet_activation": "linear", "vf_share_layers": True},
}
STEPS = "num_env_steps_sampled_lifetime"


def build(config: dict[str, Any]) -> Any:
    """The algorithm."""
    from ray.rllib.algorithms.impala import IMPALAConfig
    from ray.rllib.algorithms.ppo import PPOConfig
    from ray.rllib.core.rl_module.default_model_config import DefaultModelConfig

    name = config["algorithm"]
    return (
        {"impala": IMPALAConfig, "ppo": PPOConfig}[name]()
        .environment(config["environment"])
        .env_runners(num_env_runners=2, num_envs_per_env_runner=8)
        .learners(num_learners=0)
        .training(**SETTINGS[name])
        .rl_module(model_config=DefaultModelConfig(**MODELS[name]))
        .debugging(seed=config["seed"], log_level="ERROR")
        .reporting(min_time_s_per_iteration=0, min_sample_timesteps_per_iteration=config["every"])
        .build_algo()
    )


def layers(algorithm: Any) -> Arrays:
    """The policy network's."""
    weights = algorithm.learner_group.get_weights()["default_policy"]
    names = [name.removesuffix(".weight") for name in weights if name.endswith(".weight")]
    chosen = [name for name in names if name.startswith(("encoder.encoder.", "pi."))]
    return as_arrays([(weights[f"{name}.weight"], weights[f"{name}.bias"]) for name in chosen])


def main(config: dict[str, Any]) -> None:
    """Train for as many frames as are asked for."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray
    import torch

    torch.set_num_threads(1)
    ray.init(address="local", _node_ip_address="127.0.0.1", num_cpus=4, include_dashboard=False, log_to_driver=False,
             logging_level=logging.ERROR)  # fmt: skip
    algorithm, keeper, frames = build(config), Keeper(config["every"]), 0
    keeper.start()
    while frames < config["frames"]:
        frames = int(algorithm.train()["env_runners"][STEPS])
        keeper.offer(frames, lambda: layers(algorithm))
    keeper.save(Path(config["path"]), MODELS[config["algorithm"]].get("fcnet_activation", "tanh"))
    algorithm.stop()
    ray.shutdown()


if __name__ == "__main__":
    main(configuration())
