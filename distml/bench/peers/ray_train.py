"""A peer of `distml bench exchange`: Ray Train's TorchTrainer, which wraps the model in DDP over gloo.

Usage: python -m distml.bench.peers.ray_train CONFIG. Its workers report nothing: a report there is a barrier that
waits for the controller's next look, two seconds apart by default.
"""

from __future__ import annotations

from typing import Any

import ray
import torch
from ray.train import RunConfig, ScalingConfig, get_context
from ray.train.torch import TorchTrainer, prepare_model

from distml.bench.peers import ddp
from distml.bench.peers.blocks import build_model, configuration


def train(config: dict[str, Any]) -> None:
    """A worker's whole training."""
    torch.set_num_threads(1)
    ddp.train(config, get_context().get_world_rank(), prepare_model(build_model(config["width"])))


def main(config: dict[str, Any]) -> None:
    """Run it on all workers."""
    ray.init(address=config["address"])
    TorchTrainer(
        train,
        train_loop_config=config,
        scaling_config=ScalingConfig(num_workers=config["workers"]),
        run_config=RunConfig(storage_path=config["folder"]),
    ).fit()


if __name__ == "__main__":
    main(configuration())
