"""100 trials that do nothing: `kind: sweep` against Tune, two at a time on one Ray; and Optuna alone.

Seconds are of the whole call, `distml.run` or connecting and `Tuner.fit`, in a process that has imported what it needs.
"""

from __future__ import annotations

import importlib.util
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from distml.bench.exchange import check, in_turn, tell
from distml.bench.parts import Table, target
from distml.bench.population_speed import LIMIT_S, PEERS
from distml.bench.start import local_ray, spawn
from distml.bench.table import cells, summary

OPTIONS = ("repeats", "contenders")
TRIALS, AT_ONCE = 100, 2
LABELS = {
    "ours": "distml sweep",
    "tune": "Tune, plain",
    "reuse": "Tune, reuse_actors",
    "optuna": "Optuna alone, one process",
}
SLOW = ("tune",)  # it takes minutes: once is enough
SPEC = """\
distml: v1
kind: sweep
name: bench-sweep
base:
  task: {{name: "distml.bench.population_task:NoOp", args: {{folder: {folder}}}}}
  strategy: single
  optimizer: {{name: sgd, lr: 0.1}}
  batch_size: 8
  stop: {{steps: 1}}
  log: {{to: []}}
trials: {trials}
max_concurrent: {at_once}
space: {{optimizer.lr: {{loguniform: [1.0e-3, 1.0]}}}}
objective: {{metric: eval/score, mode: max}}
"""


def measure(repeats: int = 3, contenders: Sequence[str] = ()) -> dict[str, Any]:
    """Let them take turns; Tune without `reuse_actors` runs once.

    Raises:
        RunError: one failed.
    """
    check("--contenders", contenders, LABELS)
    names = [name for name in LABELS if name in (contenders or LABELS)]
    skipped = [] if importlib.util.find_spec("optuna") else ["optuna"]
    names = [name for name in names if name not in skipped]
    found: dict[str, list[float]] = {name: [] for name in names}
    with local_ray(cpus=AT_ONCE) as address:
        for repeat in range(repeats):
            for name in in_turn(names, repeat, repeats):
                if name in SLOW and found[name]:
                    continue
                found[name].append(once(name, address))
                tell(f"sweep, {LABELS[name]}: {found[name][-1]:.2f} s")
    seconds = {name: summary(values) for name, values in found.items()}
    return {"seconds": seconds, "repeats": repeats, "skipped": skipped, "targets": targets(seconds)}


def once(name: str, address: str) -> float:
    """One contender's seconds."""
    with tempfile.TemporaryDirectory(prefix="distml-bench-") as folder:
        if name == "ours":
            spec = Path(folder) / "spec.yaml"
            spec.write_text(SPEC.format(folder=folder, trials=TRIALS, at_once=AT_ONCE))
            spawn([str(PEERS / "our_over.py"), str(spec), address, folder], {}, LIMIT_S)
        elif name in ("tune", "reuse"):
            what = "sweep" if name == "tune" else "sweep-reuse"
            spawn([str(PEERS / "tune_noop.py"), what, address, folder, str(TRIALS), str(AT_ONCE), "0"], {}, LIMIT_S)
        else:
            spawn([str(PEERS / "optuna_noop.py"), folder, str(TRIALS)], {}, LIMIT_S)
        said = json.loads((Path(folder) / "said.json").read_text())
        return float(said.get("whole_s", said.get("fit_s")))


def targets(seconds: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """What it should have come to, where both were measured."""
    if not {"ours", "tune"} <= seconds.keys():
        return []
    ours, tune = (seconds[name]["median"] for name in ("ours", "tune"))
    return [target("seconds over plain Tune's", ours / tune, "at most", 1.3),
            target("ms that each trial adds", 1e3 * (ours - tune) / TRIALS, "at most", 50.0)]  # fmt: skip


def table(found: dict[str, Any]) -> Table:
    """Title, header, body and closing lines."""
    body = [[LABELS[name], *cells(values, 2), f"{1e3 * values['median'] / TRIALS:.1f}"]
            for name, values in found["seconds"].items()]  # fmt: skip
    closing = [f"{found['repeats']} repeats in turns, {AT_ONCE} trials at a time"]
    closing += ["Optuna is left out: pip install optuna"] if found["skipped"] else []
    return f"{TRIALS} trials that do nothing", ["", "seconds", "min", "max", "ms per trial"], body, closing
