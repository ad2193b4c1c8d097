"""What a small character model learns of a text, under every synchronous strategy: the validation loss at the end.

The setting is nanoGPT's for CPUs: 4 layers, 4 heads, 128 wide, 12 blocks of 64 characters a step, 2,000 steps of AdamW
at 1e-3, a cosine to 1e-4 after 100 steps of warm-up, beta_2 0.99, weight decay 0.1 of matrices, clipping at 1, no
biases. A tenth of the documents is validation. All strategies see the same examples
in the same order; each trains in processes of its own, one strategy at a time, with a private Ray where it has two
workers.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from distml.bench.contenders import EVERYWHERE, ThisHost, run_all, terminable
from distml.bench.exchange import check, tell
from distml.bench.transformer_speed import SPEC
from distml.errors import RunError, UsageError

OPTIONS = ("steps", "text", "contenders")
TARGET = 1.90
LIMIT_S = 3600.0
CONTENDERS: dict[str, tuple[Any, int]] = {
    "single": ("single", 1),
    "all_reduce": ("all_reduce", 2),
    "ps_sync": ("parameter_server", 2),
    **{f"zero_{stage}": ({"name": "zero", "stage": stage}, 2) for stage in (1, 2, 3)},
}


def measure(text: Path, steps: int = 2000, contenders: Sequence[str] = ()) -> dict[str, Any]:
    """Train each contender once.

    Args:
        text: a file.
        steps: of the training; the schedule ends there.
        contenders: some of `CONTENDERS`; none: all.

    Raises:
        RunError: one of them failed.
        UsageError: there is no such contender, or no such file.
    """
    check("--contenders", contenders, CONTENDERS)
    if not text.is_file():
        raise UsageError(f"--text {text}: there is no such file")
    found: dict[str, Any] = {}
    with terminable():
        for name in contenders or CONTENDERS:
            with tempfile.TemporaryDirectory(prefix="distml-bench-") as folder:
                found[name] = train(name, text.resolve(), steps, Path(folder))
            tell(f"{name}: validation loss {found[name]['loss']:.4f} after {found[name]['seconds']:.0f} s of training")
    targets = [{"what": f"{name}, validation loss after {steps:,} steps", "value": one["loss"], "bound": "at most",
                "target": TARGET, "met": one["loss"] <= TARGET} for name, one in found.items()]  # fmt: skip
    return {"text": text.name, "steps": steps, "contenders": found, "targets": targets}


def train(name: str, text: Path, steps: int, folder: Path) -> dict[str, float]:
    """One run; its last validation loss, test loss and seconds of training."""
    strategy, workers = CONTENDERS[name]
    optimizer = {**SPEC["optimizer"], "schedule": {**SPEC["optimizer"]["schedule"], "steps": steps},
                 "weight_decay": 0.1, "groups": [{"match": "*norm*", "weight_decay": 0}]}  # fmt: skip
    task = {**SPEC["task"], "data": {"path": str(text), "validation": 0.1}, "tokenizer": "characters",
            "model": {**SPEC["task"]["model"], "bias": False}}  # fmt: skip
    spec = {**SPEC, "task": task, "strategy": strategy, "optimizer": optimizer, "stop": {"steps": steps},
            "resources": {"workers": workers}}  # fmt: skip
    path, out = folder / "spec.yaml", folder / "run"
    path.write_text(yaml.safe_dump(spec), encoding="utf-8")
    run_all([(ThisHost(), ["-m", "distml", "run", str(path), "--out", str(out)])], EVERYWHERE, folder, LIMIT_S)
    result = json.loads((out / "result.json").read_text(encoding="utf-8"))
    metrics = result["metrics"]
    if "eval/loss" not in metrics:
        raise RunError(f"{name} reports no eval/loss", phase="bench")
    return {"loss": metrics["eval/loss"], "test_loss": metrics.get("test/loss", float("nan")),
            "seconds": result["wall_s"]}  # fmt: skip


def table(found: dict[str, Any]) -> tuple[str, list[str], list[list[str]], list[str]]:
    """Title, header, body and closing lines."""
    body = [[name, str(CONTENDERS[name][1]), f"{one['loss']:.4f}", f"{one['test_loss']:.4f}", f"{one['seconds']:.0f}"]
            for name, one in found["contenders"].items()]  # fmt: skip
    closing = ["loss: nats per character of held-out text; one run each, seed 0"]
    header = ["", "workers", "validation loss", "test loss", "seconds"]
    return f"{found['text']}, characters, {found['steps']:,} steps", header, body, closing
