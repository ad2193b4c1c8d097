"""Run directories as a training run would leave them, without training."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

SPEC = """\
distml: v1
kind: train
name: {name}
task: {{name: classification, data: digits}}
strategy: {strategy}
optimizer: {{name: adamw, lr: 0.001}}
batch_size: 64
stop: {{steps: 400, goal: {{metric: eval/accuracy, at_least: 0.9}}}}
checkpoint: {{every: 100, keep: 2, best: {{metric: eval/accuracy, mode: max}}}}
resources: {{workers: 2}}
"""


def write_run(
    path: Path,
    *,
    name: str = "digits",
    strategy: str = "{name: all_reduce}",
    status: str = "goal_met",
    seconds_per_step: float = 0.02,
    bytes_per_step: float = 40_000,
    speed: float = 1.0,
    staleness: float = 0.0,
    error: dict | None = None,
    steps: int = 400,
) -> Path:
    """Reports every 10 steps, evaluations every 50; the test on the best checkpoint comes last, as in a run."""
    path.mkdir(parents=True)
    (path / "spec.yaml").write_text(SPEC.format(name=name, strategy=strategy))
    (path / "environment.json").write_text(json.dumps({"python": "3.11.7", "transport": "process_group"}))
    random = np.random.default_rng(0)
    rows = []
    for step in range(0, steps + 1, 10):
        loss = 2.3 * math.exp(-speed * step / 80) + 0.05
        row = {"step": step, "wall_s": step * seconds_per_step}
        if step:
            rows.append(row | {
                "train/loss": loss * float(random.lognormal(0, 0.15)),
                "train/lr": 0.001 * (1 - step / 800),
                "train/grad_norm": 3 * loss,
                "train/examples": step * 64,
                "throughput/examples_per_s": 64 / seconds_per_step * float(random.lognormal(0, 0.05)),
                "comm/bytes": step * bytes_per_step,
                "comm/bytes_per_step": bytes_per_step,
                "timing/compute_s": seconds_per_step * 0.7,
                "timing/exchange_s": seconds_per_step * 0.3,
            })  # fmt: skip
        if step and staleness:
            rows[-1] |= {"staleness/mean": staleness + random.random(), "staleness/max": 4}
        if step % 50 == 0:
            accuracy = 1 - loss / 2.6
            rows.append(row | {"eval/loss": loss * 1.1, "eval/accuracy": accuracy, "timing/evaluate_s": 0.1})
    rows.append({"step": 100, "wall_s": steps * seconds_per_step, "test/accuracy": 0.951, "runtime/restarts": 1})
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = {
        "status": status,
        "step": steps,
        "wall_s": steps * seconds_per_step,
        "metrics": {key: value for row in rows for key, value in row.items() if "/" in key},
        "best": {"metric": "eval/accuracy", "value": 0.97, "step": steps},
        "checkpoint": f"checkpoints/step-{steps:08d}",
        "error": error,
        "pid": 1,
        "host": "h",
    }
    (path / "result.json").write_text(json.dumps(result))
    return path


@pytest.fixture
def make_run():
    """`make_run(path, **what)` writes a finished run's directory."""
    return write_run
