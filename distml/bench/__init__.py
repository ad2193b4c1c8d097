"""`distml bench`: measurements side by side with peers, in one invocation, so that the ratios mean something.

exchange    milliseconds per step by how gradients travel, against DDP, Ray Train and a documented parameter server
loop        the loop's own cost per step, against plain PyTorch doing the same
population  populations, sweeps and searches against Ray Tune, Optuna and chance
rl          frames per second, and frames and seconds to solved, against Stable-Baselines3 and RLlib
start       seconds from the command to the first update, against Ray Train's
submit      a job on a cluster against the same job beside it, and what failures cost it there
transformer language models against plain PyTorch, and ZeRO against DeepSpeed by itself
"""

from __future__ import annotations

import importlib
import inspect
import json as json_module
from pathlib import Path
from typing import Any

from distml.errors import RunError, UsageError

BENCHES = ("exchange", "loop", "population", "rl", "start", "submit", "transformer")


def bench_command(name: str, json: bool, plot: Path | None = None, **options: Any) -> int:
    """Measure, and print tables or JSON.

    Args:
        name: one of `BENCHES`.
        json: print one JSON object instead of tables.
        plot: draw the results to this file (PNG), where the measurement has a picture.
        options: of the measurement; those that are None or empty are left to its own defaults.

    Raises:
        UsageError: there is no such measurement, or it has no such option.
        RunError: one of the contenders did not come to an end.
    """
    if name not in BENCHES:
        raise UsageError(f"unknown measurement {name!r}; known: {', '.join(BENCHES)}")
    module = importlib.import_module(f"distml.bench.{name}")
    given = {key: value for key, value in options.items() if not (value is None or value is False or value == [])}
    unknown = sorted(set(given) - set(inspect.signature(module.measure).parameters))
    if plot is not None and not hasattr(module, "draw"):
        unknown.append("plot")
    if unknown:
        option = {"overrides": "set"}.get(unknown[0], unknown[0])
        raise UsageError(f"distml bench {name} has no option --{option}; see distml bench --help")
    if plot is not None and not plot.absolute().parent.is_dir():
        raise UsageError(f"there is no folder {plot.absolute().parent} for --plot")
    report = module.measure(**given)
    if plot is not None:
        plot.write_bytes(module.draw(report))
    if json:
        print(json_module.dumps(report, indent=2))
    else:
        from distml.bench.table import print_table

        for table in module.tables(report) if hasattr(module, "tables") else [module.rows(report)]:
            print_table(*table)
    failed = module.failure(report) if hasattr(module, "failure") else None
    if failed:
        raise RunError(failed, phase="bench")
    return 0
