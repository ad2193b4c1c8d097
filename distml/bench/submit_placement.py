"""Planning where 1,000 workers with a GPU each go, and 16 servers on nodes of their own, among 300 nodes."""

from __future__ import annotations

import time
from typing import Any

from distml.bench.parts import Table, target
from distml.bench.table import cells, summary
from distml.runtime.planning import Node, Request, Servers, plan_placement

OPTIONS = ("repeats",)
WORKERS, NODES, SERVERS = 1000, 300, 16
LABELS = {"pack": "packed", "spread": "spread"}


def measure(repeats: int = 5) -> dict[str, Any]:
    """Each strategy in turn; seconds of one plan."""
    nodes = [Node(f"{index:03d}", {"CPU": 32.0, "GPU": 8.0 if index < 250 else 0.0}, {"CPU": float(index % 5)})
             for index in range(NODES)]  # fmt: skip
    servers = Servers(SERVERS, "apart")
    found: dict[str, list[float]] = {name: [] for name in LABELS}
    for _ in range(repeats):
        for name in LABELS:
            began = time.perf_counter()
            plan = plan_placement(nodes, Request(WORKERS, {"CPU": 4.0, "GPU": 1.0}, name, {}, servers))
            found[name].append(time.perf_counter() - began)
            assert len(plan.ranks) == WORKERS
    seconds = {name: summary(values) for name, values in found.items()}
    slowest = max(values["max"] for values in seconds.values())
    return {"seconds": seconds, "repeats": repeats, "targets": [target("seconds of a plan", slowest, "at most", 1.0)]}


def table(found: dict[str, Any]) -> Table:
    """Title, header, body and closing lines."""
    body = [[LABELS[name], *cells({key: 1e3 * value for key, value in values.items() if key != "all"}, 1)]
            for name, values in found["seconds"].items()]  # fmt: skip
    title = f"{WORKERS} workers and {SERVERS} servers on {NODES} nodes"
    return title, ["milliseconds", "median", "min", "max"], body, [f"{found['repeats']} repeats"]
