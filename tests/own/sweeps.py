"""A small sweep, and what it leaves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from distml.runs.over import ENDS
from distml.spec.loader import LoadedSpec, load_spec

OWN = Path(__file__).resolve().parent
BASE: dict[str, Any] = {
    "task": {"name": "tuned:Tuned"},
    "optimizer": {"name": "sgd", "lr": 0.1},
    "batch_size": 4,
    "stop": {"steps": 9},
    "evaluate": {"every": 1},
    "checkpoint": {"every": 9},
    "log": {"every": 9, "to": []},
}
SWEEP: dict[str, Any] = {
    "distml": "v1",
    "kind": "sweep",
    "name": "small",
    "base": BASE,
    "space": {"optimizer.lr": {"loguniform": [0.01, 0.4]}},
    "trials": 6,
    "max_concurrent": 1,
    "objective": {"metric": "eval/loss", "mode": "min"},
}


def sweep_file(folder: Path, **changes: Any) -> Path:
    """A spec in `folder`, with the task's file beside it."""
    (folder / "tuned.py").write_text((OWN / "tuned.py").read_text())
    path = folder / "sweep.json.yaml"
    path.write_text(json.dumps({**SWEEP, **changes}))
    return path


def loaded(folder: Path, **changes: Any) -> LoadedSpec[Any]:
    """The same, loaded."""
    return load_spec(sweep_file(folder, **changes))


def events(out: Path) -> list[dict[str, Any]]:
    """The journal."""
    return [json.loads(line) for line in (out / "trials.jsonl").read_text().splitlines()]


def ends(out: Path) -> dict[str, str]:
    """Trial -> how it ended."""
    return {row["trial"]: row["event"] for row in events(out) if row["event"] in ENDS}


def values(out: Path) -> list[dict[str, Any]]:
    """What was proposed, in order."""
    return [row["values"] for row in events(out) if row["event"] == "proposed"]
