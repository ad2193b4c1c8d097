"""One GPU: tokens per second, and the share of its dense bf16 peak that the model's own operations are (MFU).

    MFU = tokens/s x (6 N + 12 L·T·d) / peak        (`distml/launch/plan/flops.py` says what is counted)

gpt2_124m     12 layers, 768 wide, 12 texts of 1,024 tokens a step: the shape of nanoGPT's bench.py, which `plain` has
gpt2_1.5b     48 layers, 1,600 wide, under ZeRO with bf16 weights

Ours are runs as any, started as processes, one worker on one GPU; the clock is the run's own, without evaluation.
"""

from __future__ import annotations

import itertools
import json
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from distml.bench.contenders import EVERYWHERE, ThisHost, run_all, terminable
from distml.bench.exchange import check, tell
from distml.bench.loop import NEVER
from distml.errors import RunError, UsageError
from distml.launch.plan.cluster import CARDS
from distml.launch.plan.flops import flops_per_token, model_flops_utilisation

OPTIONS = ("steps", "contenders")
BLOCK, VOCABULARY, WARM_UP, LIMIT_S = 1024, 50304, 20, 580.0


@dataclass(frozen=True)
class Shape:
    """What is trained, and how.

    Attributes:
        batch: texts a step.
        target: the least MFU.
        further: of our spec.
    """

    label: str
    layers: int
    heads: int
    width: int
    batch: int
    target: float
    further: dict[str, Any] = field(default_factory=dict)

    @property
    def parameters(self) -> int:
        """N: those that take part in a product per token (12 width² of a layer's matrices, norms and the output)."""
        per_layer = 12 * self.width**2 + 13 * self.width
        return self.layers * per_layer + 2 * self.width + VOCABULARY * self.width

    @property
    def flops_per_token(self) -> int:
        """Forward and backward."""
        return flops_per_token(self.parameters, self.layers, BLOCK, self.width)


SHAPES = {
    "gpt2_124m": Shape("distml, GPT-2 124 M", 12, 12, 768, 12, 0.35, {"strategy": "single"}),
    "gpt2_1.5b": Shape("distml, GPT-2 1.5 B, zero 1", 48, 25, 1600, 16, 0.45,
                       {"strategy": {"name": "zero", "stage": 1}}),
    "plain": Shape("plain PyTorch, GPT-2 124 M", 12, 12, 768, 12, 0.0),
}  # fmt: skip


def measure(steps: int = 100, contenders: Sequence[str] = ()) -> dict[str, Any]:
    """Train each contender once.

    Args:
        steps: of each, a multiple of 10 and at least 40.
        contenders: some of `SHAPES`; none: all.

    Raises:
        UsageError: there is no GPU here, or one whose peak is not known.
        RunError: one of them failed.
    """
    check("--contenders", contenders, SHAPES)
    card, peak = this_card()
    found: dict[str, Any] = {}
    with terminable():
        for name in contenders or SHAPES:
            with tempfile.TemporaryDirectory(prefix="distml-bench-") as folder:
                windows = one_run(name, SHAPES[name], steps, Path(folder))
            found[name] = numbers(SHAPES[name], windows, peak)
            tell(f"{SHAPES[name].label}: {found[name]['tokens_per_s']:,.0f} tokens/s, MFU {found[name]['mfu']:.1%}")
    return {"card": card, "peak_tflops": peak / 1e12, "steps": steps, "contenders": found, "targets": targets(found)}


def this_card() -> tuple[str, float]:
    """The GPU's name, and its peak in operations per second."""
    import torch

    if not torch.cuda.is_available():
        raise UsageError("--part gpu needs a GPU that torch can use; there is none here")
    name = torch.cuda.get_device_name()
    known = [card for card in CARDS if card.split("-")[0] in name.lower().replace(" ", "")]
    if not known:
        raise UsageError(f"the peak of {name} is not known; known cards: {', '.join(CARDS)}")
    return name, CARDS[known[0]].tflops * 1e12


def one_run(name: str, shape: Shape, steps: int, folder: Path) -> list[float]:
    """Seconds per step of each window of ten steps after the warm-up."""
    if name == "plain":
        config = {"device": "cuda", "compile": True, "vocabulary": VOCABULARY, "block": BLOCK, "batch": shape.batch,
                  "layers": shape.layers, "heads": shape.heads, "width": shape.width, "steps": steps}  # fmt: skip
        arguments = ["-m", "distml.bench.peers.nanogpt_shape", json.dumps(config)]
        run_all([(ThisHost(), arguments)], EVERYWHERE, folder, LIMIT_S)
        last = (folder / "output-0.log").read_text(encoding="utf-8").strip().splitlines()[-1]
        return [seconds / 10 for seconds in json.loads(last)["windows_s"][WARM_UP // 10 - 1 :]]
    path, out = folder / "spec.yaml", folder / "run"
    path.write_text(yaml.safe_dump(spec_of(shape, steps)), encoding="utf-8")
    arguments = ["-m", "distml", "run", str(path), "--out", str(out)]
    run_all([(ThisHost(), arguments)], EVERYWHERE, folder, LIMIT_S)
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    times = [(row["step"], row["wall_s"]) for row in rows if "train/loss" in row and row["step"] >= WARM_UP]
    return [(b[1] - a[1]) / (b[0] - a[0]) for a, b in itertools.pairwise(times)]


def spec_of(shape: Shape, steps: int) -> dict[str, Any]:
    """Our run."""
    model = {"name": "gpt", "layers": shape.layers, "heads": shape.heads, "width": shape.width,
             "vocabulary": VOCABULARY, "compile": True}  # fmt: skip
    return {
        "distml": "v1", "name": "bench-gpu",
        "task": {"name": "language_model", "data": "stdlib", "tokenizer": "bytes", "block": BLOCK, "model": model},
        "optimizer": {"name": "adamw", "lr": 6e-4, "betas": [0.9, 0.95], "weight_decay": 0.1, "clip_norm": 1.0},
        "precision": "bf16", "batch_size": shape.batch, "stop": {"steps": steps},
        "evaluate": {"every": NEVER}, "checkpoint": {"every": NEVER}, "log": {"every": 10, "to": []},
        "resources": {"workers": 1, "gpus_per_worker": 1}, "limits": {"start_s": 400}, **shape.further,
    }  # fmt: skip


def numbers(shape: Shape, windows: Sequence[float], peak: float) -> dict[str, float]:
    """Tokens per second and MFU in the median window."""
    if not windows:
        raise RunError(f"no window after {WARM_UP} steps; give --steps 40 or more", phase="bench")
    rate = shape.batch * BLOCK / statistics.median(windows)
    return {"tokens_per_s": rate, "ms_per_step": statistics.median(windows) * 1e3,
            "mfu": model_flops_utilisation(rate, shape.flops_per_token, peak)}  # fmt: skip


def targets(found: dict[str, Any]) -> list[dict[str, Any]]:
    """MFU of ours, and ours over plain PyTorch."""
    rows = [(f"{SHAPES[name].label}, MFU", one["mfu"], SHAPES[name].target)
            for name, one in found.items() if SHAPES[name].target]  # fmt: skip
    if "gpt2_124m" in found and "plain" in found:
        ratio = found["gpt2_124m"]["tokens_per_s"] / found["plain"]["tokens_per_s"]
        rows.append(("GPT-2 124 M, tokens/s over plain PyTorch's", ratio, 1.0))
    return [{"what": what, "value": value, "bound": "at least", "target": target, "met": value >= target}
            for what, value, target in rows]  # fmt: skip


def table(found: dict[str, Any]) -> tuple[str, list[str], list[list[str]], list[str]]:
    """Title, header, body and closing lines."""
    body = [[SHAPES[name].label, f"{one['tokens_per_s']:,.0f}", f"{one['ms_per_step']:.1f}", f"{one['mfu']:.1%}"]
            for name, one in found["contenders"].items()]  # fmt: skip
    closing = [f"MFU = tokens/s x (6 N + 12 L·T·d) / {found['peak_tflops']:g} TFLOP/s dense bf16; T {BLOCK}",
               *(f"{shape.label}: N {shape.parameters:,}, {shape.flops_per_token:,} FLOPs per token"
                 for shape in SHAPES.values())]  # fmt: skip
    return f"{found['card']}, bf16", ["", "tokens/s", "ms per step", "MFU"], body, closing
