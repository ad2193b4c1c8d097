"""`distml plan`: from a spec, and a cluster file or this machine, to a plan; what would make it fit.

spec, --set ── load ──▶ job ── Facts (traced) ──▶ Size, activations ─┐
cluster file ─────────▶ Places, Machine ─────────────────────────────┴── estimate ──▶ Plan ──▶ text, JSON
                                         does not fit: the same again for each candidate (fit.py)
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from distml.errors import ExitCode, UsageError
from distml.launch.plan.cluster import ClusterSpec, read_cluster
from distml.launch.plan.estimate import Plan, Traced, estimate
from distml.launch.plan.fit import smallest_change
from distml.launch.plan.machine import Machine, machine_of
from distml.launch.plan.places import Places, nodes_of, places_of
from distml.launch.plan.text import plan_lines, shape_lines
from distml.spec.loader import LoadedSpec, load_train
from distml.spec.schema import JobSpec

ASSUMED_GPUS_PER_NODE = 8


class Planner:
    """Plans a spec, and its variations: what is traced is traced once.

    Args:
        spec, overrides: as `load_spec` takes them.
        cluster: None: this machine.

    Raises:
        UsageError: the spec, or its model.
    """

    def __init__(self, spec: str | dict[str, Any], overrides: Sequence[str], cluster: ClusterSpec | None) -> None:
        from distml.launch.plan.facts import Facts
        from distml.tasks.traced import NotTracedError

        self.spec, self.overrides, self.cluster = spec, list(overrides), cluster
        self.loaded: LoadedSpec[JobSpec] = load_train(spec, overrides)
        self.machines: dict[str, Machine] = {}
        try:
            self.facts = Facts(self.loaded)
        except NotTracedError as error:
            raise UsageError(f"cannot plan task {self.loaded.job.task.name}: {error}") from error

    def plan(self, job: JobSpec | None = None) -> Plan:
        """Of the spec, or of a variation of it.

        Raises:
            UsageError: there is no room for so many workers.
        """
        job = job or self.loaded.job
        places = places_of(job, nodes_for(job, self.cluster))
        found = self.facts.activations(job)
        traced = Traced(unknown=found) if isinstance(found, str) else Traced(found.saved, found.peak)
        return estimate(job, self.facts.size, traced, places, self._machine(job, places), self.cluster)

    def _machine(self, job: JobSpec, places: Places) -> Machine:
        key = f"{places.ranks} {places.ranks_on_host} {places.transport} {places.gpus}"
        if key not in self.machines:  # a rate is measured once
            self.machines[key] = machine_of(job, places, self.cluster)
        return self.machines[key]

    def attempt(self, changes: Sequence[str]) -> Plan | None:
        """The plan with these changes on top; None: they are refused."""
        try:
            return self.plan(load_train(self.spec, [*self.overrides, *changes]).job)
        except UsageError:
            return None

    def smallest_change(self) -> list[str] | None:
        """What makes it fit, as `--set` takes it."""
        job, most = self.loaded.job, None
        if self.cluster is not None or not job.resources.gpus_per_worker:
            most = _most_workers(job, self.cluster)
        return smallest_change(job, most, self.attempt)


def nodes_for(job: JobSpec, cluster: ClusterSpec | None) -> list[str]:
    """The node of each rank: the cluster's; else CPUs of this machine, or GPUs eight to a node."""
    if cluster is not None:
        return nodes_of(job, cluster)
    per_node = ASSUMED_GPUS_PER_NODE if job.resources.gpus_per_worker else job.resources.workers
    return [f"node {rank // per_node}" for rank in range(job.resources.workers)]


def _most_workers(job: JobSpec, cluster: ClusterSpec | None) -> int:
    """That there is room for; more on one machine's CPUs would only share its memory."""
    if cluster is None:
        return job.resources.workers
    each = cluster.gpus_per_node // max(1, job.resources.gpus_per_worker)
    return cluster.nodes * each if job.resources.gpus_per_worker else job.resources.workers


def plan_command(*, spec: str, overrides: list[str], cluster: Path | None, as_json: bool, shapes: bool) -> int:
    """The verb `plan`; its exit code."""
    planner = Planner(spec, overrides, read_cluster(cluster) if cluster is not None else None)
    plan = planner.plan()
    change = None if plan.fits else planner.smallest_change()
    if as_json:
        print(json.dumps({**plan.to_json(), "smallest_change": change, "shapes": plan.size.shapes}, indent=2))
    else:
        if shapes:
            print("\n".join(shape_lines(plan.size.shapes)))
        print("\n".join(plan_lines(plan, change, searched=not plan.fits)))
    return int(ExitCode.DONE if plan.fits else ExitCode.GOAL_MISSED)
