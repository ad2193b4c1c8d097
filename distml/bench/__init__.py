"""`distml bench`: measurements side by side with peers, in one invocation, so that the ratios mean something.

loop    the loop's own cost per step, against plain PyTorch doing the same
start   seconds from the command to the first update, against Ray Train's
"""

from __future__ import annotations

import importlib
import json as json_module

from distml.errors import UsageError

BENCHES = ("loop", "start")


def bench_command(name: str, json: bool) -> int:
    """Measure, and print a table or JSON.

    Args:
        name: one of `BENCHES`.
        json: print one JSON object instead of the table.

    Raises:
        UsageError: there is no such measurement.
        RunError: one of the contenders did not come to an end.
    """
    if name not in BENCHES:
        raise UsageError(f"unknown measurement {name!r}; known: {', '.join(BENCHES)}")
    module = importlib.import_module(f"distml.bench.{name}")
    report = module.measure()
    if json:
        print(json_module.dumps(report, indent=2))
    else:
        from distml.bench.table import print_table

        print_table(*module.rows(report))
    return 0
