"""Populations on the toy surface, and a way to run one with a host of the test's own."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from own.over import carry_through
from own.plain_host import PlainHost

from distml.population.context import OverContext
from distml.population.host import Host
from distml.population.run import PopulationRun
from distml.runs.directory import Result
from distml.runs.display import Display, SilentDisplay
from distml.spec.loader import load_spec

OWN = Path(__file__).resolve().parent


def toy(**changes: Any) -> dict[str, Any]:
    """Two members on the surface of `surrogate.py`."""
    base = {
        "task": {"name": "surrogate:Surrogate", "args": {"h0": 1.0, "h1": 1.0}}, "strategy": "single",
        "optimizer": {"name": "sgd", "lr": 0.02}, "batch_size": 1, "stop": {"steps": 240}, "log": {"to": []},
    }  # fmt: skip
    spec = {
        "distml": "v1", "kind": "population", "name": "toy", "members": 2, "every": 4, "base": base,
        "space": {"task.args.h0": {"loguniform": [1e-3, 1.0]}, "task.args.h1": {"loguniform": [1e-3, 1.0]}},
        "objective": {"metric": "eval/quality", "mode": "max"},
        "explore": {"name": "perturb", "factors": [0.5, 2.0], "resample": 0.0}, "synchronous": True,
    }  # fmt: skip
    for path, value in changes.items():
        *holders, last = path.split("__")
        place: Any = spec
        for key in holders:
            place = place.setdefault(key, {})
        place[last] = copy.deepcopy(value)
    return spec


class Kept(SilentDisplay):
    """Keeps what is said."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def note(self, text: str) -> None:
        self.lines.append(text)


def run_with(
    spec: Mapping[str, Any],
    out: Path,
    host: Host | None = None,
    *,
    resume: bool = False,
    display: Display | None = None,
) -> tuple[PopulationRun, Result]:
    """One population in `out`; how it ended, recorded also when it ends by an exception."""
    loaded = load_spec(spec, directory=OWN)

    def make(context: OverContext) -> PopulationRun:
        return PopulationRun(context, host or PlainHost(loaded.job.members))

    return carry_through(loaded, out, make, resume=resume, display=display or SilentDisplay())


def lineage(out: Path) -> list[dict[str, Any]]:
    """All events, without the seconds they happened at."""
    events = [json.loads(line) for line in (out / "lineage.jsonl").read_text().splitlines()]
    return [{key: value for key, value in event.items() if key not in ("wall_s", "seconds")} for event in events]


def per_member(events: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """The events of each member, in their order."""
    return {name: [event for event in events if event["member"] == name] for name in
            sorted({event["member"] for event in events})}  # fmt: skip
