"""A cluster of small nodes in a process of its own, and elastic runs on it whose nodes go and come at given steps.

    python -m own.elastic CASES OUT

CASES: JSON, a list of {"name", "spec", "goes": step or null, "comes": bool}. For each, nodes are as at the start; one
goes when the run reports the step `goes`, and comes again once the driver has said what it did about it. Steps are slow
until the group has grown. A case may also have "nodes": CPUs of those beside the head, and "joins": [step, environment]
of one more node, and "come": CPUs of those that come for the one that goes, at once. Prints
"FOUND" and JSON: by name the notes, the status or error, and the size of each row of the metrics.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from own.on_ray import Notes
from ray.cluster_utils import Cluster

import distml
from distml.errors import DistmlError
from distml.runs.display import Metrics
from distml.runtime import elastic
from distml.runtime.authentication import prepare_authentication
from distml.runtime.connection import PRIVATE_SETTINGS

WORKERS_ON_HEAD = 2


class Scene(Notes):
    """Nodes go and come while a run reports to it."""

    def __init__(self, cluster: Cluster, case: dict[str, Any], grown: Path) -> None:
        super().__init__()
        self.cluster, self.grown, self.goes, self.comes = cluster, grown, case["goes"], case["comes"]
        self.joins, self.come = case.get("joins"), case.get("come", [])

    def report(self, step: int, fraction: float, metrics: Metrics) -> None:
        if self.goes is not None and step >= self.goes:
            self.goes = None
            self.cluster.remove_node(next(iter(self.cluster.worker_nodes)), allow_graceful=False)
            for cpus in self.come:
                self.cluster.add_node(num_cpus=cpus)
        if self.joins is not None and step >= self.joins[0]:
            environment, self.joins = self.joins[1], None
            self.cluster.add_node(num_cpus=1, env_vars=environment)

    def note(self, text: str) -> None:
        super().note(text)
        if self.comes and "was lost" in text:
            self.comes = False
            self.cluster.add_node(num_cpus=1)
        ends = ("there is room for more", "no more than", *(["was lost"] if self.come else []))
        if self.goes is None and any(end in text for end in ends):
            self.grown.touch()


def act(cluster: Cluster, case: dict[str, Any], out: Path) -> dict[str, Any]:
    """One run, with the nodes that it is to have at its start."""
    if "nodes" in case:
        for node in list(cluster.worker_nodes):
            cluster.remove_node(node, allow_graceful=False)
    for cpus in case.get("nodes", [] if cluster.worker_nodes else [1]):
        cluster.add_node(num_cpus=cpus)
    cluster.wait_for_nodes()
    grown = out.with_name(f"{out.name}-grown")
    scene = Scene(cluster, case, grown)
    spec = {**case["spec"], "task": {"name": "paced:Paced", "args": {"until": str(grown)}}}
    try:
        ended = distml.run(spec, out=out, runtime="ray", display=scene).status
    except DistmlError as error:
        ended = str(error)
    metrics = out / "metrics.jsonl"
    rows = [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.exists() else []
    return {"notes": scene.lines, "ended": ended, "sizes": [(row["step"], row.get("runtime/workers")) for row in rows]}


def main(cases: str, out: str) -> None:
    """All cases in turn."""
    prepare_authentication(None)
    os.environ |= PRIVATE_SETTINGS  # workers no nicer than whatever else runs on this machine
    import ray

    elastic.LOOK_S, elastic.GROW_EVERY_S = 0.3, 0.5
    # A node that has gone is declared lost soon.
    soon = {"health_check_period_ms": 500, "health_check_failure_threshold": 4, "health_check_initial_delay_ms": 500}
    head = {"num_cpus": WORKERS_ON_HEAD, "include_dashboard": False, "_system_config": soon}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    cluster.add_node(num_cpus=1)
    ray.init(address=cluster.address, log_to_driver=False)
    found = {case["name"]: act(cluster, case, Path(out) / case["name"]) for case in json.loads(cases)}
    print("FOUND", json.dumps(found))
    ray.shutdown()
    cluster.shutdown()


if __name__ == "__main__":
    main(*sys.argv[1:])
