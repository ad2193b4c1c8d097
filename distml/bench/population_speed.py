"""A population of no-ops against Tune's PBT: seconds from the first iteration to the last one.

Both sides have 4 members that take 20 iterations each, a decision every 2, at which the worst quarter copies; each
iteration adds its learning rate to a number and notes the time. All wait for each other before the first one: starting
Ray, its actors and the libraries is outside. What an exploit costs is inside: Tune's is a checkpoint on disk, a pause
and a restart (with `reuse_actors` a reset).
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from distml.bench.exchange import check, in_turn, tell
from distml.bench.parts import Table, target
from distml.bench.start import local_ray, spawn
from distml.bench.table import cells, summary
from distml.errors import RunError

OPTIONS = ("repeats", "contenders")
MEMBERS, ITERATIONS, EVERY = 4, 20, 2
LIMIT_S = 600.0  # of each run
PEERS = Path(__file__).parent / "peers"
LABELS = {"ours": "distml population", "reuse": "Tune PBT, reuse_actors", "plain": "Tune PBT"}
SLOW = ("plain",)  # it takes minutes: once is enough
SPEC = """\
distml: v1
kind: population
name: bench-population
base:
  task: {{name: "distml.bench.population_task:NoOp", args: {{folder: {folder}, together: {members}}}}}
  strategy: single
  optimizer: {{name: sgd, lr: 0.1}}
  batch_size: 8
  stop: {{steps: {iterations}}}
  log: {{to: []}}
members: {members}
every: {every}
space: {{optimizer.lr: {{loguniform: [1.0e-3, 1.0]}}}}
objective: {{metric: eval/score, mode: max}}
exploit: {{name: truncation, fraction: 0.25}}
"""


def measure(repeats: int = 3, contenders: Sequence[str] = ()) -> dict[str, Any]:
    """Let them take turns; Tune without `reuse_actors` runs once.

    Raises:
        RunError: one failed.
    """
    check("--contenders", contenders, LABELS)
    names = [name for name in LABELS if name in (contenders or LABELS)]
    found: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    with local_ray(cpus=MEMBERS) as address:
        for repeat in range(repeats):
            for name in in_turn(names, repeat, repeats):
                if name in SLOW and found[name]:
                    continue
                found[name].append(once(name, address))
                tell(f"speed, {LABELS[name]}: {found[name][-1]['seconds']:.2f} s, "
                     f"{found[name][-1]['exploits']:.0f} exploits")  # fmt: skip
    seconds = {name: summary([one["seconds"] for one in runs]) for name, runs in found.items()}
    exploits = {name: summary([one["exploits"] for one in runs]) for name, runs in found.items()}
    return {"seconds": seconds, "exploits": exploits, "repeats": repeats, "targets": targets(seconds)}


def once(name: str, address: str) -> dict[str, float]:
    """One contender's run: seconds, and exploits."""
    with tempfile.TemporaryDirectory(prefix="distml-bench-") as folder:
        if name == "ours":
            spec = Path(folder) / "spec.yaml"
            spec.write_text(SPEC.format(folder=folder, members=MEMBERS, iterations=ITERATIONS, every=EVERY))
            spawn([str(PEERS / "our_over.py"), str(spec), address, folder], {}, LIMIT_S)
            rows = [json.loads(line) for line in (Path(folder) / "run" / "lineage.jsonl").read_text().splitlines()]
            exploits = sum(row["event"] == "copy" for row in rows)
        else:
            what = "pbt-reuse" if name == "reuse" else "pbt"
            numbers = map(str, (MEMBERS, ITERATIONS, EVERY))
            spawn([str(PEERS / "tune_noop.py"), what, address, folder, *numbers], {}, LIMIT_S)
            exploits = json.loads((Path(folder) / "said.json").read_text())["exploits"]
        least = MEMBERS * ITERATIONS if name == "ours" else 1  # Tune's clones go on at the donor's iteration
        return {"seconds": seconds_of(Path(folder), least), "exploits": float(exploits)}


def seconds_of(folder: Path, least: int) -> float:
    """From the first iteration, for which all members have waited, to the begin of the last one.

    Raises:
        RunError: fewer than `least` iterations were noted.
    """
    ticks = [[float(line) for line in path.read_text().split()] for path in folder.glob("ticks-*")]
    count = sum(map(len, ticks))
    if len(ticks) < MEMBERS or count < least:
        raise RunError(f"{len(ticks)} members noted {count} iterations; there should be {least}",
                       phase="bench")  # fmt: skip
    return max(map(max, ticks)) - min(map(min, ticks))


def targets(seconds: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """What it should have come to, of those that were measured."""
    if "ours" not in seconds:
        return []
    ours = seconds["ours"]["median"]
    made = [target("seconds after start", ours, "at most", 1.5)]
    for name, wanted in (("reuse", 8.0), ("plain", 50.0)):
        if name in seconds:
            made.append(target(f"{LABELS[name]} / ours", seconds[name]["median"] / ours, "at least", wanted))
    return made


def table(found: dict[str, Any]) -> Table:
    """Title, header, body and closing lines."""
    seconds, exploits = found["seconds"], found["exploits"]
    ours = seconds.get("ours", {}).get("median")
    body = [
        [LABELS[name], *cells(values, 2), f"{values['median'] / ours:.1f}" if ours else "",
         "/".join(f"{count:.0f}" for count in exploits[name]["all"]), str(len(values["all"]))]
        for name, values in seconds.items()
    ]  # fmt: skip
    closing = ["from the first iteration, for which all have waited, to the last one; exploits: of each repeat"]
    title = f"{MEMBERS} members x {ITERATIONS} no-op iterations, a decision every {EVERY}"
    return title, ["", "seconds", "min", "max", "x ours", "exploits", "repeats"], body, closing
