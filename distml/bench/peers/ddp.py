"""A peer of `distml bench exchange`: torch's DistributedDataParallel over gloo.

Usage: torchrun ... -m distml.bench.peers.ddp CONFIG; `train` is also what Ray Train's workers run.
"""

from __future__ import annotations

import os
from typing import Any

import torch.distributed as dist
from torch import nn

from distml.bench.peers.blocks import Batches, StepClock, build_model, build_optimizer, configuration


def train(config: dict[str, Any], rank: int, model: nn.Module) -> None:
    """One worker's training with a model that is wrapped already."""
    optimizer = build_optimizer(config["optimizer"], model)
    batches, clock = Batches(config["width"], rank, config["batch"]), StepClock(config["folder"], rank)
    for _ in range(config["steps"]):
        clock.tick()
        inputs, targets = next(batches)
        optimizer.zero_grad()
        nn.functional.mse_loss(model(inputs), targets).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    clock.flush()


def main(config: dict[str, Any]) -> None:
    """One of torchrun's processes."""
    dist.init_process_group("gloo")
    train(config, int(os.environ["RANK"]), nn.parallel.DistributedDataParallel(build_model(config["width"])))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(configuration())
