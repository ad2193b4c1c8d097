"""Where a job's workers are: how many share a host, and what carries their gradients. No torch, no ray."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from distml.errors import UsageError
from distml.launch.plan.cluster import ClusterSpec
from distml.runtime.transport import choose
from distml.spec.schema import AllReduceSpec, JobSpec
from distml.spec.zero import ZeroSpec

INLINE = "inline"


@dataclass(frozen=True)
class Places:
    """Workers on hosts.

    Attributes:
        ranks: workers, N.
        hosts: that they are on.
        ranks_on_host: on the fullest of them, H.
        gpus: each has one.
        transport: what carries gradients: inline, none, shared_memory, process_group or object_store.
        overlaps: sums are taken while backward runs (`exchange/ddp.py`).
    """

    ranks: int
    hosts: int
    ranks_on_host: int
    gpus: bool
    transport: str
    overlaps: bool = False


def places_of(job: JobSpec, nodes: Sequence[str]) -> Places:
    """The workers on these nodes, `nodes[rank]` being a rank's.

    Raises:
        UsageError: the spec asks for shared memory, and the workers do not share a host.
    """
    gpus, ranks = bool(job.resources.gpus_per_worker), len(nodes)
    hosts = [list(nodes).count(name) for name in dict.fromkeys(nodes)]
    if isinstance(job.strategy, ZeroSpec):
        transport = "process_group"
    elif ranks == 1 and not gpus:
        transport = INLINE
    else:
        transport = choose(job, nodes).name
    return Places(ranks, len(hosts), max(hosts), gpus, transport, overlaps(job, transport, len(hosts)))


def overlaps(job: JobSpec, transport: str, hosts: int) -> bool:
    """Whether sums are taken while backward runs."""
    plain = isinstance(job.strategy, AllReduceSpec) and job.strategy.compression is None
    return plain and transport == "process_group" and (bool(job.resources.gpus_per_worker) or hosts > 1)


def nodes_of(job: JobSpec, cluster: ClusterSpec) -> list[str]:
    """The node of each rank, as `resources.placement` lays them out.

    Raises:
        UsageError: there is not room for all.
    """
    resources = job.resources
    room = room_for(job, cluster)
    if resources.workers > room:
        largest = 1 if resources.placement == "strict_spread" else _room(job, cluster)
        kind = "GPU" if resources.gpus_per_worker else "CPU"
        raise UsageError(
            f"resources.workers is {resources.workers}, and the cluster has room for {room} "
            f"({cluster.nodes} x {largest} workers, {kind}s; placement {resources.placement}); lower it, or add nodes"
        )
    spread = resources.placement in ("spread", "strict_spread")
    per_node = math.ceil(resources.workers / cluster.nodes) if spread else _room(job, cluster)
    return [f"node {rank // per_node}" for rank in range(resources.workers)]


def room_for(job: JobSpec, cluster: ClusterSpec) -> int:
    """Workers that the cluster has room for, as `resources.placement` lays them out."""
    if job.resources.placement == "strict_spread":
        return cluster.nodes if _room(job, cluster) else 0
    return _room(job, cluster) * (1 if job.resources.placement == "strict_pack" else cluster.nodes)


def of_size(job: JobSpec, workers: int) -> JobSpec:
    """The job with so many workers, of an elastic group as it is at some time."""
    resources = job.resources.model_copy(update={"size": workers})
    return job.model_copy(update={"resources": resources})


def _room(job: JobSpec, cluster: ClusterSpec) -> int:
    """Workers that a node has room for."""
    resources = job.resources
    if resources.gpus_per_worker:
        return cluster.gpus_per_node // resources.gpus_per_worker
    if cluster.cpus_per_node is not None:
        return cluster.cpus_per_node // resources.cpus_per_worker
    return math.ceil(resources.workers / cluster.nodes)
