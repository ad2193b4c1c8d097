"""What a failure costs a job of two workers on two of three nodes: a node that is killed, a link that is cut for 20 s.

A node is killed as a power failure does it: its link is dead and its processes are gone, and nobody is told. Seconds
run from the moment that a worker is declared lost to the next report. The cut is the longest time between two
reports, with default limits; it costs no restart.
"""

from __future__ import annotations

import re
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from distml.bench.exchange import tell
from distml.bench.hosts import Cluster, cluster
from distml.bench.parts import Table, target
from distml.bench.submit_watch import LOOK_S, Watched, submitted
from distml.bench.table import cells, summary
from distml.errors import RunError

OPTIONS = ("repeats",)
CUT_S, SETTLE_S = 20.0, 3.0
GIVEN_UP_S = 90.0
LOST = re.compile(r"^rank \d+ was lost", re.MULTILINE)
LABELS = {"noticed": "node killed: until it is declared lost", "again": "  from then until it trains again",
          "cut": "link cut for 20 s: longest time without a report"}  # fmt: skip


def measure(repeats: int = 1) -> dict[str, Any]:
    """One cut and one kill each; a node takes the place of the killed one.

    Raises:
        UsageError: there can be no hosts here. RunError: the job did not go on.
    """
    found: dict[str, list[float]] = {name: [] for name in LABELS}
    restarts: list[int] = []
    with cluster(nodes=4, cpus=1) as made, tempfile.TemporaryDirectory(prefix="distml-bench-") as folder:
        for repeat in range(repeats):
            with submitted(made, Path(folder), f"cut-{repeat}", seconds=600, placement="strict_spread") as (
                watched,
                process,
            ):
                watched.first(process)
                found["cut"].append(cut_once(made, watched))
                restarts.append(int(watched.metric("runtime/restarts")))
            tell(f"submit, faults: cut {found['cut'][-1]:.1f} s, {restarts[-1]} restarts")
            with submitted(made, Path(folder), f"kill-{repeat}", seconds=600, placement="strict_spread") as (
                watched,
                process,
            ):
                watched.first(process)
                noticed, again = kill_once(made, watched, Path(folder) / f"kill-{repeat}.log")
            found["noticed"].append(noticed)
            found["again"].append(again)
            tell(f"submit, faults: noticed after {noticed:.1f} s, trains again {again:.1f} s later")
            if repeat + 1 < repeats:
                made.add()
    seconds = {name: summary(values) for name, values in found.items()}
    return {"seconds": seconds, "restarts": restarts, "repeats": repeats, "targets": targets(seconds, restarts)}


def cut_once(made: Cluster, watched: Watched) -> float:
    """The longest time without a report, of a cut between one worker and all else."""
    node = busy_nodes(made)[-1]
    watched.watch(SETTLE_S)
    began = time.monotonic()
    cutting = threading.Thread(target=made.cut, args=(node, CUT_S), daemon=True)
    cutting.start()
    while cutting.is_alive() or watched.seen[-1][0] < began + CUT_S + 1.0:
        watched.watch(10 * LOOK_S)
        if time.monotonic() > began + GIVEN_UP_S:
            raise RunError(f"no report for {GIVEN_UP_S:g} s after a link was cut for {CUT_S:g} s", phase="bench")
    watched.watch(SETTLE_S)
    return watched.longest_gap(began)


def kill_once(made: Cluster, watched: Watched, log: Path) -> tuple[float, float]:
    """Seconds until a worker is declared lost, and from then to the next report."""
    node = busy_nodes(made)[-1]
    watched.watch(SETTLE_S)
    began = time.monotonic()
    made.kill(node)
    while not LOST.search(log.read_text(encoding="utf-8", errors="replace")):
        watched.watch(LOOK_S)
        if time.monotonic() > began + GIVEN_UP_S:
            raise RunError(f"the job did not miss the killed node for {GIVEN_UP_S:g} s", phase="bench")
    said, seen = time.monotonic(), len(watched.seen)
    while len(watched.seen) == seen:
        watched.watch(LOOK_S)
        if time.monotonic() > said + GIVEN_UP_S:
            raise RunError(f"no report for {GIVEN_UP_S:g} s after a node was declared lost", phase="bench")
    declared = said - watched.metric("timing/recover_s")  # it is said when all is ready to go on
    return declared - began, time.monotonic() - declared


def busy_nodes(made: Cluster) -> list[int]:
    """Nodes, the head excepted, on which a worker runs."""
    return [node for node in range(1, len(made.nodes)) if any(map(is_worker, made.pids(node)))]


def is_worker(pid: int) -> bool:
    """Whether a process is a worker of a job, as Ray titles it."""
    try:
        return b"WorkerActor" in Path("/proc", str(pid), "cmdline").read_bytes()
    except OSError:
        return False


def targets(seconds: dict[str, dict[str, Any]], restarts: list[int]) -> list[dict[str, Any]]:
    """What it should have come to."""
    return [target("seconds from a node's loss to training again", seconds["again"]["median"], "at most", 15.0),
            target("seconds that a cut of 20 s costs", seconds["cut"]["median"], "at most", 35.0),
            target("restarts that it costs", float(max(restarts)), "at most", 0.0)]  # fmt: skip


def table(found: dict[str, Any]) -> Table:
    """Title, header, body and closing lines."""
    body = [[LABELS[name], *cells(values, 1)] for name, values in found["seconds"].items()]
    closing = [f"{found['repeats']} repeats; default limits; three nodes with 1 Gbit/s links besides the head"]
    return "Failures under a job of two workers on two nodes", ["seconds", "median", "min", "max"], body, closing
