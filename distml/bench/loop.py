"""`distml bench loop`: what a step of the inline loop costs beyond plain PyTorch doing the same step.

Both train the digits MLP (batch 64, fused AdamW, one torch thread, the same examples in the same order) and log every
10 steps; ours writes a run directory as any run does, with metrics.jsonl, result.json and TensorBoard. Repeats
alternate. Both clocks run from the log of step 10 to that of the last step, so set-up, final evaluation and
checkpoint are outside and every report's cost is inside.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from distml.bench.peers.plain_torch import train
from distml.bench.table import cells, conditions, summary, verdict
from distml.launch.run import run
from distml.runs.display import SilentDisplay
from distml.tasks.classification import load_digits, splits
from distml.tasks.data import DataOrder

TARGET_MS = 0.5
NEVER = 10**9
SPEC: dict[str, Any] = {
    "distml": "v1",
    "name": "bench-loop",
    "task": {"name": "classification", "data": "digits", "model": {"name": "mlp", "hidden": [128]}},
    "strategy": "single",
    "optimizer": {"name": "adamw", "lr": 2e-3},
    "batch_size": 64,
    "evaluate": {"every": NEVER},
    "checkpoint": {"every": NEVER},
    "log": {"every": 10},
}


class Stopwatch(SilentDisplay):
    """Wall-clock and processor time from the first report to the latest."""

    def __init__(self) -> None:
        self.first: tuple[int, float, float] | None = None

    def report(self, step: int, fraction: float = 0.0, metrics: Mapping[str, float | None] | None = None) -> None:
        self.latest = step, time.perf_counter(), time.process_time()
        self.first = self.first or self.latest

    def ms_per_step(self) -> tuple[float, float]:
        """(wall-clock, processor) milliseconds of one step."""
        assert self.first is not None
        steps = self.latest[0] - self.first[0]
        return tuple((self.latest[clock] - self.first[clock]) / steps * 1e3 for clock in (1, 2))  # type: ignore[return-value]


def measure(repeats: int = 5, steps: int = 2000) -> dict[str, Any]:
    """Alternate ours and plain PyTorch; milliseconds per step.

    Args:
        repeats: of each.
        steps: of each repeat, a multiple of 10 and at least 20.
    """
    times: dict[str, list[tuple[float, float]]] = {"ours": [], "plain": []}
    losses: dict[str, float] = {}
    about = conditions(steps=steps, repeats=repeats, torch_threads=1)
    contenders = {"ours": measure_ours, "plain": measure_plain}
    for repeat in range(repeats):
        for name in sorted(contenders, reverse=bool(repeat % 2)):
            with tempfile.TemporaryDirectory(prefix="distml-bench-") as folder:
                watch = Stopwatch()
                losses[name] = contenders[name](steps, Path(folder), watch)
                times[name].append(watch.ms_per_step())
    wall = {name: [one[0] for one in pairs] for name, pairs in times.items()}
    overhead = [ours - plain for ours, plain in zip(wall["ours"], wall["plain"], strict=True)]
    return {
        "bench": "loop",
        "conditions": about,
        "ms_per_step": {name: summary(values) for name, values in wall.items()},
        "cpu_ms_per_step": {name: summary([one[1] for one in pairs]) for name, pairs in times.items()},
        "overhead_ms": summary(overhead),
        "target_ms": TARGET_MS,
        "last_train_loss": losses,
    }


def measure_ours(steps: int, folder: Path, watch: Stopwatch) -> float:
    """One run of distml; the last train/loss."""
    result = run({**SPEC, "stop": {"steps": steps}}, out=folder / "run", runtime="inline", display=watch)
    return float(result.metrics["train/loss"])


def measure_plain(steps: int, folder: Path, watch: Stopwatch) -> float:
    """One run of plain PyTorch; the last mean loss."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        images, labels = splits(load_digits, 0)["train"]
        order = DataOrder(len(labels), 0).entries(0, 64 * steps)
        return train(images, labels, order, steps, folder / "log.jsonl", watch.report)
    finally:
        torch.set_num_threads(threads)


def rows(report: dict[str, Any]) -> tuple[str, list[str], list[list[str]], list[str]]:
    """Title, header, body and closing lines of the table."""
    wall, cpu = report["ms_per_step"], report["cpu_ms_per_step"]
    labels = {"ours": "distml, inline", "plain": "plain PyTorch"}
    body = [[labels[name], *cells(wall[name], 3), f"{cpu[name]['median']:.3f}"] for name in ("ours", "plain")]
    extra = cpu["ours"]["median"] - cpu["plain"]["median"]
    body.append(["overhead", *cells(report["overhead_ms"], 3), f"{extra:.3f}"])
    about, losses = report["conditions"], report["last_train_loss"]
    closing = [
        f"overhead in ms per step: {verdict(report['overhead_ms']['median'], report['target_ms'])}",
        f"{about['repeats']} x {about['steps']} steps each, alternating; {about['cpus']} CPUs, load before "
        f"{about['load_before']}, torch {about['torch']}",
        f"last train/loss: {losses['ours']:.6f} and {losses['plain']:.6f}",
    ]
    header = ["", "ms per step", "min", "max", "processor ms"]
    return "Digits MLP, batch 64, fused AdamW, a log every 10 steps", header, body, closing
