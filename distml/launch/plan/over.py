"""What a job over jobs comes to: how many runs of its base, how many at the same time. No torch."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass

from distml.launch.plan.cluster import ClusterSpec
from distml.launch.plan.estimate import Plan, steps_of
from distml.spec.nas import NasSpec
from distml.spec.over_jobs import OverJobs
from distml.spec.population import PopulationSpec
from distml.spec.schema import CheckpointSpec, EvaluateSpec
from distml.spec.search_rules import space_of
from distml.spec.sweep import SweepSpec


@dataclass(frozen=True)
class Many:
    """The runs of a job over jobs.

    Attributes:
        what: members, trials or children.
        number: of them.
        at_once: as many as the spec lets run at the same time; None: as many as fit.
        share: of a base's budget that each has on average, as far as the spec says.
        least: why it may be less than that; "" where it is not.
    """

    what: str
    number: int
    at_once: int | None
    share: float = 1.0
    least: str = ""


def many_of(job: OverJobs) -> Many:
    """How many runs of which part of the base's budget."""
    if isinstance(job, PopulationSpec):
        steps = steps_of(job.base)
        whole = job.stop.steps
        share = min(1.0, whole / (job.members * steps)) if whole and steps else 1.0
        return Many("members", job.members, job.max_concurrent, share)
    if isinstance(job, SweepSpec):
        number = job.trials or math.prod(len(dimension.values) for dimension in space_of(job))
        ends = job.scheduler.name in ("asha", "hyperband")
        early = f"{job.scheduler.name} ends trials early" if ends else ""
        return Many("trials", number, job.max_concurrent, least=early)
    assert isinstance(job, NasSpec)
    return Many("children", job.trials, job.max_concurrent)


def room_of(many: Many, plan: Plan, cluster: ClusterSpec | None) -> int:
    """GPUs (or CPU workers) that the runs have together: the cluster's, this machine's, or what the spec says."""
    each = plan.places.ranks
    wanted = each * min(many.number, many.at_once or many.number)
    if cluster is not None and plan.places.gpus:
        return max(each, min(wanted, cluster.nodes * cluster.gpus_per_node))
    if plan.places.gpus:
        return wanted if many.at_once else each
    cpus = (os.cpu_count() or 1) // plan.job.resources.cpus_per_worker
    return max(each, min(wanted, cpus) if many.at_once is None else wanted)


def unused_line(job: OverJobs) -> str | None:
    """What the base says of its own run that its variants do not do; None: nothing.

    A base may also be run alone, so this is no error.
    """
    base, usual, is_population = job.base, CheckpointSpec().model_dump(), isinstance(job, PopulationSpec)
    written = base.checkpoint.model_dump(include=base.checkpoint.model_fields_set)
    kept = [f"checkpoint.{key}" for key, value in written.items() if value != usual[key]]
    instead = "a population has its own checkpoint" if is_population else "the best keep their last weights"
    parts = [f"{', '.join(kept)} ({instead})"] if kept else []
    if isinstance(job, PopulationSpec) and base.evaluate.every not in (EvaluateSpec().every, job.every):
        parts.append("evaluate.every (members are evaluated at each decision)")
    if base.log.to and "to" in base.log.model_fields_set:
        parts.append("log.to (each has its metrics.jsonl)")
    return f"not used of the base: {'; '.join(parts)}" if parts else None


def over_line(job: OverJobs) -> str:
    """What a run says first: runs of the base, and steps in all."""
    many, steps = many_of(job), steps_of(job.base)
    budget = f" x {steps:,} steps: {many.number * steps * many.share:,.0f} in all" if steps else ""
    limit = f", at most {many.at_once} at the same time" if many.at_once else ""
    least = f"; less, as {many.least}" if many.least else ""
    return f"plan: {many.number:,} {many.what}{budget}{limit}{least}"
