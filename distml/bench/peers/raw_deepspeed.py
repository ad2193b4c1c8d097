"""DeepSpeed by itself, started by its own launcher: the peer of `strategy: zero`.

    deepspeed --num_gpus W raw_deepspeed.py CONFIG      (CONFIG: a file with JSON)

The model, its initial weights, the examples and their order, the optimiser and DeepSpeed's settings are those of our
run; the loop is what DeepSpeed's documentation shows. Rank 0 writes the seconds at which steps had ended, one line
for each `every` steps: step, seconds since the epoch, mean loss of the step.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import deepspeed
import torch
from torch.nn import functional

from distml.spec.loader import load_train
from distml.spec.schema import AdamWSpec
from distml.strategies.base import seed_everything
from distml.strategies.optimizer import schedule_factor
from distml.tasks.build import build_task
from distml.tasks.data import DataOrder, length, take


def main(config: dict[str, object]) -> None:
    """Train as the spec at `config["spec"]` says, with DeepSpeed's own settings `config["deepspeed"]`."""
    torch.set_num_threads(1)
    deepspeed.init_distributed(dist_backend="gloo" if os.environ.get("DS_ACCELERATOR") == "cpu" else "nccl")
    rank, world_size = deepspeed.comm.get_rank(), deepspeed.comm.get_world_size()
    job = load_train(str(config["spec"])).job
    task = build_task(job)
    seed_everything(job.seed)
    model = task.build_model()
    spec = job.optimizer
    assert isinstance(spec, AdamWSpec)
    optimizer = torch.optim.AdamW(model.parameters(), lr=spec.lr, betas=(spec.betas[0], spec.betas[1]), eps=spec.eps,
                                  weight_decay=spec.weight_decay, fused=True)  # fmt: skip
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config["deepspeed"])
    dataset = task.data("train")
    order = DataOrder(length(dataset), job.seed)
    share, path, every = job.batch_size // world_size, Path(str(config["times"])), int(str(config["every"]))
    assert job.stop.steps is not None
    for step in range(job.stop.steps):
        start = step * job.batch_size + rank * share
        inputs, targets = take(dataset, order.entries(start, start + share))
        logits = engine(inputs.to(engine.device))
        loss = functional.cross_entropy(logits.flatten(0, 1).float(), targets.to(engine.device).flatten())
        engine.backward(loss)
        for group in engine.optimizer.param_groups:
            group["lr"] = spec.lr * schedule_factor(spec.schedule, step, job.stop.steps)
        engine.step()
        if rank == 0 and (step == 0 or (step + 1) % every == 0):
            with open(path, "a", encoding="ascii") as file:
                file.write(f"{step + 1} {time.time()} {loss.item()}\n")
    deepspeed.comm.barrier()  # whoever leaves first would break the others' connections while they still end
    deepspeed.comm.destroy_process_group()


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[-1]).read_text()))
