"""What `distml run` says first: the plan of the job as it was built and placed. No torch: the driver does it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from distml.launch.plan.estimate import Plan, Traced, estimate
from distml.launch.plan.machine import Machine, gpu_machine, machine_of
from distml.launch.plan.places import INLINE, Places, overlaps
from distml.launch.plan.states import Size
from distml.runtime.group import Description
from distml.spec.schema import JobSpec


def plan_of_run(job: JobSpec, description: Description, facts: Mapping[str, Any]) -> Plan:
    """The plan of what the workers have built.

    Args:
        facts: what rank 0 says of itself, as `tasks/traced.py` measures it.
    """
    shapes = {entry.name: entry.shape for entry in description.layout.entries}
    size = Size(shapes, sum(array.nbytes for array in description.frozen.values()))
    places = _places(job, description)
    traced = Traced(facts["saved"], facts["peak"], facts["unknown"])
    return estimate(job, size, traced, places, _machine(job, places, facts), None)


def _places(job: JobSpec, description: Description) -> Places:
    ranks, hosts = job.resources.workers, max(1, len(description.hosts))
    name = description.transport.partition(" ")[0]
    transport = name if name in ("none", "shared_memory", "process_group", "object_store") else INLINE
    gpus = bool(job.resources.gpus_per_worker)
    return Places(ranks, hosts, math.ceil(ranks / hosts), gpus, transport, overlaps(job, transport, hosts))


def _machine(job: JobSpec, places: Places, facts: Mapping[str, Any]) -> Machine:
    if not places.gpus or facts["card"] is None:
        return machine_of(job, places, None)
    name, num_bytes = facts["card"]
    return gpu_machine(str(name), float(num_bytes), "rank 0's")
