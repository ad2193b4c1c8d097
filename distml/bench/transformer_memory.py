"""Bytes that each rank holds under ZeRO: against the formulas (Rajbhandari et al. 2020), and against `distml plan`.

A GPT of 11 million parameters trains in bf16 with AdamW. Of Psi parameters each of N ranks holds, between backward and
update,

    one rank                16 Psi               2 weights, 2 gradients, 12 optimiser with its float32 weights
    stage 1                 4 Psi + 12 Psi / N
    stage 2                 2 Psi + 14 Psi / N
    stage 3                 16 Psi / N

The peak is the most that is held at any time of a step, with activations and buffers.
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
from distml.spec.loader import load_train

OPTIONS = ("contenders",)
TARGET_HELD, TARGET_PEAK = 0.05, 0.15
LIMIT_S = 300.0
CONTENDERS = {"alone": (1, 1), "zero_1": (1, 2), "zero_2": (2, 2), "zero_3": (3, 2)}  # stage, ranks
MODEL = {"name": "gpt", "layers": 6, "heads": 6, "width": 384}


def formula(stage: int, ranks: int, parameters: int) -> float:
    """Bytes of weights, gradients and optimiser per rank, in bf16 with Adam."""
    weights, gradients = (2 / ranks if stage >= 3 else 2), (2 / ranks if stage >= 2 else 2)
    return (weights + gradients + 12 / ranks) * parameters


def measure(contenders: Sequence[str] = ()) -> dict[str, Any]:
    """Two steps of each.

    Args:
        contenders: some of `CONTENDERS`; none: all.

    Raises:
        RunError: one of them failed.
    """
    check("--contenders", contenders, CONTENDERS)
    found: dict[str, Any] = {}
    with terminable():
        for name in contenders or CONTENDERS:
            with tempfile.TemporaryDirectory(prefix="distml-bench-") as folder:
                found[name] = one_run(*CONTENDERS[name], Path(folder))
            tell(f"{name}: {found[name]['held'] / 1e6:.1f} MB held, {found[name]['peak'] / 1e6:.1f} MB at the most")
    return {"contenders": found, "targets": targets(found)}


def one_run(stage: int, ranks: int, folder: Path) -> dict[str, float]:
    """What is held in all, by the rank that holds most; with the formula's and the plan's numbers."""
    spec = {**SPEC, "task": {**SPEC["task"], "block": 128, "model": MODEL}, "precision": "bf16",
            "strategy": {"name": "zero", "stage": stage}, "resources": {"workers": ranks},
            "batch_size": 4 * ranks, "micro_batch_size": 2, "stop": {"steps": 2000}}  # fmt: skip
    path = folder / "spec.yaml"
    path.write_text(yaml.safe_dump(spec), encoding="utf-8")
    configs = [{"spec": str(path), "rank": rank, "size": ranks, "folder": str(folder)} for rank in range(ranks)]
    commands = [(ThisHost(), ["-m", "distml.bench.memory_rank", json.dumps(config)]) for config in configs]
    run_all(commands, EVERYWHERE, folder, LIMIT_S)
    held = [json.loads((folder / f"held-{rank}.json").read_text()) for rank in range(ranks)]
    most = max(held, key=lambda one: one["weights"] + one["gradients"] + one["optimizer"])
    return {**most, "held": most["weights"] + most["gradients"] + most["optimizer"],
            "peak": max(one["peak"] for one in held), **planned(path, stage, ranks)}  # fmt: skip


def planned(spec: Path, stage: int, ranks: int) -> dict[str, float]:
    """The formula's bytes, and the plan's without what a process needs by itself."""
    from distml.launch.plan.command import Planner

    plan = Planner(load_train(spec), None).plan()
    return {"parameters": plan.size.trained, "formula": formula(stage, ranks, plan.size.trained),
            "plan": plan.memory.states.model_states, "plan_peak": plan.memory.total - plan.memory.process}  # fmt: skip


def targets(found: dict[str, Any]) -> list[dict[str, Any]]:
    """How far it is from the formula and the plan, as a share of those."""
    rows = []
    for name, one in found.items():
        for what, value, expected, limit in (
            ("held, off the formula", one["held"], one["formula"], TARGET_HELD),
            ("held, off the plan", one["held"], one["plan"], TARGET_HELD),
            ("peak, off the plan", one["peak"], one["plan_peak"], TARGET_PEAK),
        ):
            off = abs(value / expected - 1)
            rows.append({"what": f"{name}, {what}", "value": off, "bound": "at most", "target": limit,
                         "met": off <= limit})  # fmt: skip
    return rows


def table(found: dict[str, Any]) -> tuple[str, list[str], list[list[str]], list[str]]:
    """Title, header, body and closing lines."""
    keys = ("weights", "gradients", "optimizer", "held", "formula", "plan", "peak", "plan_peak")
    body = [[name, *(f"{one[key] / 1e6:.1f}" for key in keys)] for name, one in found["contenders"].items()]
    parameters = next(iter(found["contenders"].values()))["parameters"]
    closing = [
        "MB per rank, after a micro-batch's backward; peak: the most in a step, activations and buffers included"
    ]
    header = ["", "weights", "gradients", "optimiser", "held", "formula", "plan", "peak", "plan's peak"]
    return f"GPT of {parameters:,} parameters, bf16, AdamW, 2 x 2 x 128 tokens per rank", header, body, closing
