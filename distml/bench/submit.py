"""`distml bench submit`: what it costs to run on a cluster instead of beside it, and what its failures cost.

start      submitting until the first update, against `distml run` on the same cluster; and coming back to a job
faults     a node that is killed, and a link that is cut for 20 s, while two workers train
placement  planning where 1,000 workers go

Each is one part; without `--part` all run. The cluster is a real one on this machine: hosts in network namespaces with
shaped links, a node of Ray on each, tokens, the Jobs API, and a client on a host of its own. It needs root.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from distml.bench.exchange import check
from distml.bench.parts import failure, measure_parts, tables
from distml.errors import UsageError

PARTS = ("start", "faults", "placement")

__all__ = ["PARTS", "failure", "measure", "tables"]


def measure(part: Sequence[str] = (), repeats: int | None = None) -> dict[str, Any]:
    """Run the parts asked for; one that fails is reported, and the others go on.

    Args:
        repeats: of each measurement.

    Raises:
        UsageError: there is no such part.
    """
    chosen = list(part) or list(PARTS)
    check("--part", chosen, PARTS)
    if repeats is not None and repeats < 1:
        raise UsageError(f"--repeats {repeats} is not possible; give at least 1")
    return measure_parts("submit", chosen, {"repeats": repeats})
