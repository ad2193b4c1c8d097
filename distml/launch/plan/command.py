"""`distml plan`: from a spec, and a cluster file or this machine, to a plan; what would make it fit.

spec, --set ── load ──▶ job ── Facts (traced) ──▶ Size, activations ─┐
cluster file ─────────▶ Places, Machine ─────────────────────────────┴── estimate ──▶ Plan ──▶ text, JSON
                                         does not fit: the same again for each candidate (fit.py)
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from distml.errors import ExitCode, UsageError
from distml.launch.plan.budget import Budget
from distml.launch.plan.cluster import ClusterSpec, read_cluster
from distml.launch.plan.estimate import Plan, Traced, estimate
from distml.launch.plan.fit import gentlest, levels_of, smallest_change
from distml.launch.plan.machine import Machine, machine_of
from distml.launch.plan.over import Many, many_of, room_of
from distml.launch.plan.places import Places, nodes_of, of_size, places_of, room_for
from distml.launch.plan.text import condition, plan_lines, settings, shape_lines, worker_name
from distml.memory import binary_size
from distml.spec.loader import LoadedSpec, load_spec, load_train
from distml.spec.over_jobs import OverJobs
from distml.spec.schema import JobSpec

ASSUMED_GPUS_PER_NODE = 8
WORTH_IT = 0.9  # of the memory: less of a saving is none


class Planner:
    """Plans a job, and its variations: what is traced is traced once.

    Args:
        loaded: the job.
        cluster: None: this machine.

    Raises:
        UsageError: its model cannot be built without values.
    """

    def __init__(self, loaded: LoadedSpec[JobSpec], cluster: ClusterSpec | None) -> None:
        from distml.launch.plan.facts import Facts
        from distml.tasks.traced import NotTracedError

        self.loaded, self.job, self.cluster = loaded, loaded.job, cluster
        self.source = json.loads(self.job.model_dump_json(by_alias=True))
        self.machines: dict[str, Machine] = {}
        try:
            self.facts = Facts(loaded)
        except NotTracedError as error:
            raise UsageError(f"cannot plan task {self.job.task.name}: {error}") from error

    def plan(self, job: JobSpec | None = None) -> Plan:
        """Of the job, or of a variation of it.

        Raises:
            UsageError: there is no room for so many workers.
        """
        job = job or self.job
        elastic = job.resources.elastic
        if elastic is None:
            return self._plan_of(job)
        room = elastic.max if self.cluster is None else room_for(job, self.cluster)
        large = self._plan_of(of_size(job, max(elastic.min, min(elastic.max, room))))
        small = self._plan_of(of_size(job, elastic.min))  # of few each has more
        note = (f"workers are {elastic.min} to {elastic.max}: memory is what one of {elastic.min} has, a step and its "
                f"hours are of {large.places.ranks}")  # fmt: skip
        return replace(large, memory=small.memory, micro_batch=small.micro_batch, accumulation=small.accumulation,
                       notes=(*large.notes, note))  # fmt: skip

    def _plan_of(self, job: JobSpec) -> Plan:
        """Of a group of one size."""
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
        """The plan with these changes on top, as `--set` takes them; None: they are refused."""
        try:
            return self.plan(load_train(self.source, changes, directory=self.loaded.directory).job)
        except UsageError:
            return None

    def smallest_change(self) -> list[str] | None:
        """What makes it fit, as `--set` takes it."""
        return smallest_change(levels_of(self.job, self._most_workers()), self.attempt)

    def smaller(self, plan: Plan) -> list[str] | None:
        """The gentlest single change that saves memory, for a job that does not fit although it should."""
        limit = WORTH_IT * plan.memory.total
        return gentlest(levels_of(self.job, self._most_workers()), self.attempt, lambda one: one.memory.total <= limit)

    def _most_workers(self) -> int | None:
        """That there is room for; more on one machine's CPUs would only share its memory."""
        workers, gpus, cluster = self.job.resources.workers, self.job.resources.gpus_per_worker, self.cluster
        if not gpus:
            return workers
        return None if cluster is None else cluster.nodes * (cluster.gpus_per_node // gpus)


def nodes_for(job: JobSpec, cluster: ClusterSpec | None) -> list[str]:
    """The node of each rank: the cluster's; else CPUs of this machine, or GPUs eight to a node."""
    if cluster is not None:
        return nodes_of(job, cluster)
    per_node = ASSUMED_GPUS_PER_NODE if job.resources.gpus_per_worker else job.resources.workers
    return [f"node {rank // per_node}" for rank in range(job.resources.workers)]


def memory_advice(loaded: LoadedSpec[JobSpec]) -> str:
    """What to say of a job that ran out of memory: what it needs, and what would need less; "" where it is unknown."""
    try:
        planner = Planner(loaded, None)
        plan = planner.plan()
        change = planner.smaller(plan) if plan.fits else planner.smallest_change()
    except UsageError:
        return ""
    said = f"plan says {binary_size(plan.memory.total)} per rank"
    changed = planner.attempt(change) if change else None
    return f"{said}; try {settings(change)}{condition(changed)}" if change and changed else said


@dataclass(frozen=True)
class Children:
    """Many runs of the job, as they are asked for.

    Attributes:
        number: of runs.
        gpus: that there are; None: the cluster's, else as many as one run takes.
        hours_each: GPU-hours of a run; None: the plan's.
    """

    number: int
    gpus: int | None = None
    hours_each: float | None = None


def budget_of(plan: Plan, children: Children, cluster: ClusterSpec | None, many: Many | None = None) -> Budget:
    """What they come to.

    Args:
        many: what a job over jobs says of its runs.

    Raises:
        UsageError: it is not known how long one takes, or there is no room for one.
    """
    each, unit = plan.places.ranks, worker_name(plan)
    of_cluster = cluster.nodes * cluster.gpus_per_node if cluster is not None and plan.places.gpus else 0
    gpus = children.gpus or (max(of_cluster, each) if many is None else room_of(many, plan, cluster))
    if gpus < each:
        raise UsageError(f"--gpus is {gpus}, and each child is on {each} {unit}s; raise it, or lower resources.workers")
    hours, share = hours_of(plan), many.share if many is not None else 1.0
    if children.hours_each is not None:
        least = most = children.hours_each
    elif hours is not None:
        least, most = (each * share * one for one in hours)
    else:
        raise UsageError("--children needs to know how long one takes, and stop has no steps, examples, tokens or "
                         "seconds; give --hours-each, or one of those")  # fmt: skip
    return Budget(children.number, least, most, gpus, each, unit, many.what if many is not None else "children")


def hours_of(plan: Plan) -> tuple[float, float] | None:
    """The least and the most of one run: as planned, and no longer than its `stop.seconds`."""
    limit = plan.job.stop.seconds
    if limit is None:
        return plan.hours
    if plan.hours is None:
        return limit / 3600, limit / 3600
    least, most = (min(hours, limit / 3600) for hours in plan.hours)
    return least, most


def plan_command(
    *, spec: str, overrides: list[str], cluster: Path | None, as_json: bool, shapes: bool,
    children: Children | None = None, gpus: int | None = None, hours_each: float | None = None,
) -> int:  # fmt: skip
    """The verb `plan`; its exit code.

    Args:
        children: of a training job: so many runs of it. A job over jobs says itself how many, and is given `gpus` and
            `hours_each` alone.
    """
    machines = read_cluster(cluster) if cluster is not None else None
    loaded = load_spec(spec, overrides)
    many = many_of(loaded.job) if isinstance(loaded.job, OverJobs) else None
    if many is not None:
        number = children.number if children is not None else many.number
        children = Children(number, gpus, hours_each)
        many = replace(many, number=number)
    elif children is None and (gpus is not None or hours_each is not None):
        raise UsageError("--gpus and --hours-each are of --children; add --children N")
    planner = Planner(load_train(spec, overrides) if loaded.base is None else loaded.base, machines)
    plan = planner.plan()
    budget = _budget(plan, children, machines, many)
    change = None if plan.fits else planner.smallest_change()
    if as_json:
        kind = getattr(loaded.job, "kind")  # noqa: B009 (each kind declares its own literal)
        whole = budget.to_json() if budget is not None else None
        said = {"kind": kind, **plan.to_json(), "smallest_change": change, "shapes": plan.size.shapes,
                "children": whole}  # fmt: skip
        print(json.dumps(said, indent=2))
    else:
        changed = planner.attempt(change) if change else None
        lines = [f"{loaded.summary}: {many.number:,} {many.what}, each of them"] if many is not None else []
        lines += shape_lines(plan.size.shapes) if shapes else []
        lines += plan_lines(plan, change, changed, searched=not plan.fits)
        lines += [] if children is None else [_sum_line(budget, many)]
        print("\n".join(lines))
    return int(ExitCode.DONE if plan.fits else ExitCode.GOAL_MISSED)


def _sum_line(budget: Budget | None, many: Many | None) -> str:
    """The last line: what all runs come to."""
    if budget is None:
        return "all of them: base.stop has no steps, examples, tokens or seconds; give --hours-each"
    return f"{budget}{f'; less, as {many.least}' if many and many.least else ''}"


def _budget(plan: Plan, children: Children | None, cluster: ClusterSpec | None, many: Many | None) -> Budget | None:
    """What all runs come to; None where nobody asked, or a job over jobs does not say how long a run of it takes."""
    if children is None or (many is not None and children.hours_each is None and hours_of(plan) is None):
        return None
    return budget_of(plan, children, cluster, many)
