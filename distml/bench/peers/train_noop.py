"""The peer of `distml bench start`: Ray Train's TorchTrainer with a training function that does nothing.

Usage: python train_noop.py ADDRESS FOLDER. Writes the time at which each worker's function began to FOLDER/entered-RANK
and that at which `fit` returned to FOLDER/returned (seconds since the epoch).
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import ray
from ray.train import RunConfig, ScalingConfig, get_context
from ray.train.torch import TorchTrainer


def train(config: dict[str, Any]) -> None:
    """A worker's whole training."""
    rank = get_context().get_world_rank()
    Path(config["folder"], f"entered-{rank}").write_text(repr(time.time()))


def main(address: str, folder: str) -> None:
    """Run it on two workers."""
    ray.init(address=address)
    TorchTrainer(
        train,
        train_loop_config={"folder": folder},
        scaling_config=ScalingConfig(num_workers=2),
        run_config=RunConfig(storage_path=folder),
    ).fit()
    Path(folder, "returned").write_text(repr(time.time()))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
