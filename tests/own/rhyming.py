"""A tiny GPT with tied weights on nursery rhymes, and chains of strategies and numbers of workers that train it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from own.oracle import OWN, distance, saved, spec_of

import distml

TASK = {"name": "language_model", "data": {"path": str(OWN / "rhymes.txt"), "validation": 0.2, "test": 0.2},
        "block": 16, "model": {"name": "gpt", "layers": 1, "heads": 2, "width": 16, "tied": True}}  # fmt: skip
LIMITS = {"heartbeat_s": 0.5, "lost_after_s": 10.0, "start_s": 120.0}
ADAM = {"name": "adamw", "lr": 0.003, "weight_decay": 0.1, "clip_norm": 1.0}


def rhyming(strategy: Any, workers: int, steps: int = 30, **changes: Any) -> dict[str, Any]:
    """A job whose batches 1, 2, 3 and 4 workers can share."""
    values = {"optimizer": ADAM, "checkpoint": {"every": 10, "keep": 9}, "evaluate": {"every": 10}, "limits": LIMITS}
    return spec_of(TASK, workers=workers, steps=steps, strategy=strategy, **{**values, **changes})


def zero(stage: int) -> dict[str, Any]:
    return {"name": "zero", "stage": stage}


def chain(out: Path, links: list[tuple[Any, int, int]], runtime: str | None = None) -> distml.Result:
    """Train in one run directory under each (strategy, workers) up to so many steps."""
    for strategy, workers, steps in links:
        where = "inline" if workers == 1 else runtime
        result = distml.run(rhyming(strategy, workers, steps), out=out, runtime=where)
        assert (result.status, result.step) == ("done", steps)
    return result


def assert_alike(one: Path, other: Path, tolerance: float = 1e-5) -> None:
    """Weights and moments of the newest checkpoints, whoever wrote them."""
    first, second = saved(one), saved(other)
    for stem in ("model", "optimizer"):
        assert distance(first[stem], second[stem]) <= tolerance
