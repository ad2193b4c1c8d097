"""Tokens per second of one process on a CPU: `strategy: single`, inline, against ten lines of plain PyTorch.

Both train GPT-2's shape with 4 layers, 128 wide, 12 blocks of 64 tokens a step, on the same bytes of the Python
library's source in the same order, with fused AdamW, clipping, a cosine schedule and one torch thread; both read their
loss every 10 steps. Repeats alternate within one process. The clocks run from the loss of step 10 to that of the last.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distml.bench.loop import NEVER, Stopwatch
from distml.bench.peers.plain_gpt import PlainGPT, train
from distml.bench.table import cells, summary
from distml.launch.run import run
from distml.spec.loader import load_train
from distml.spec.schema import JobSpec
from distml.strategies.optimizer import schedule_factor
from distml.tasks.build import build_task
from distml.tasks.data import DataOrder, length, take

OPTIONS = ("repeats", "steps")
TARGET = 0.97
LAYERS, HEADS, WIDTH, BLOCK, BATCH = 4, 4, 128, 64, 12
SPEC: dict[str, Any] = {
    "distml": "v1",
    "name": "bench-transformer",
    "task": {
        "name": "language_model", "data": {"path": "stdlib", "validation": 0.002, "test": 0.002}, "tokenizer": "bytes",
        "block": BLOCK,
        "model": {"name": "gpt", "layers": LAYERS, "heads": HEADS, "width": WIDTH},
    },
    "strategy": "single",
    "optimizer": {
        "name": "adamw", "lr": 1e-3, "betas": [0.9, 0.99], "clip_norm": 1.0,
        "schedule": {"name": "cosine", "warmup": 100, "final": 0.1, "steps": 2000},
    },
    "batch_size": BATCH,
    "evaluate": {"every": NEVER},
    "checkpoint": {"every": NEVER},
    "log": {"every": 10, "to": []},
}  # fmt: skip


def measure(repeats: int = 5, steps: int = 120) -> dict[str, Any]:
    """Alternate ours and plain PyTorch.

    Args:
        repeats: of each.
        steps: of each repeat, a multiple of 10 and at least 100.
    """
    found: dict[str, list[float]] = {"ours": [], "plain": []}
    losses: dict[str, float] = {}
    job = load_train({**SPEC, "stop": {"steps": steps}}).job
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for repeat in range(repeats):
            for name in sorted(found, reverse=bool(repeat % 2)):
                watch = Stopwatch()
                losses[name] = _ours(job, watch) if name == "ours" else _plain(job, watch)
                found[name].append(BATCH * BLOCK / watch.ms_per_step()[0] * 1e3)
    finally:
        torch.set_num_threads(threads)
    ratios = [ours / plain for ours, plain in zip(found["ours"], found["plain"], strict=True)]
    ratio = summary(ratios)
    target = {"what": "tokens/s over plain PyTorch's, median of the repeats", "value": ratio["median"],
              "bound": "at least", "target": TARGET, "met": ratio["median"] >= TARGET}  # fmt: skip
    return {"tokens_per_s": {name: summary(values) for name, values in found.items()}, "ratio": ratio,
            "last_train_loss": losses, "repeats": repeats, "steps": steps, "targets": [target]}  # fmt: skip


def _ours(job: JobSpec, watch: Stopwatch) -> float:
    with tempfile.TemporaryDirectory(prefix="distml-bench-") as folder:
        result = run({**SPEC, "stop": job.stop.model_dump(exclude_none=True)}, out=Path(folder) / "run",
                     runtime="inline", display=watch)  # fmt: skip
    return float(result.metrics["train/loss"])


def _plain(job: JobSpec, watch: Stopwatch) -> float:
    task = build_task(job)
    dataset = task.data("train")
    order = DataOrder(length(dataset), job.seed)
    torch.manual_seed(job.seed)
    model = PlainGPT(257, BLOCK, LAYERS, HEADS, WIDTH)
    last = [0.0]

    def batches(step: int) -> tuple[Tensor, Tensor]:
        inputs, targets = take(dataset, order.entries(step * BATCH, (step + 1) * BATCH))
        return inputs, targets

    def rate(step: int) -> float:
        return job.optimizer.lr * schedule_factor(job.optimizer.schedule, step, None)

    def logged(step: int, loss: float) -> None:
        last[0] = loss
        watch.report(step)

    assert job.stop.steps is not None
    train(model, batches, job.stop.steps, rate, logged, betas=(0.9, 0.99), weight_decay=0.0)
    return last[0]


def table(found: dict[str, Any]) -> tuple[str, list[str], list[list[str]], list[str]]:
    """Title, header, body and closing lines."""
    rates, losses = found["tokens_per_s"], found["last_train_loss"]
    body = [["distml, single, inline", *cells(rates["ours"], 0)], ["plain PyTorch", *cells(rates["plain"], 0)],
            ["ratio", *cells(found["ratio"], 3)]]  # fmt: skip
    closing = [f"{found['repeats']} x {found['steps']} steps each, alternating, one thread; last train/loss "
               f"{losses['ours']:.4f} and {losses['plain']:.4f}"]  # fmt: skip
    title = f"GPT, {LAYERS} layers, {WIDTH} wide, {BATCH} x {BLOCK} tokens a step"
    return title, ["", "tokens/s", "min", "max"], body, closing
