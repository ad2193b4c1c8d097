"""Where processes go: what can never fit is refused, bundles are asked for, ranks and servers get their nodes."""

from __future__ import annotations

from collections.abc import Mapping

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group

from distml.errors import UsageError
from distml.spec.schema import JobSpec


def check_resources(job: JobSpec, private: bool) -> None:
    """Refuse at once what this cluster can never place, saying what was asked for and what there is.

    Raises:
        UsageError: with both.
    """
    resources = job.resources
    each = {"CPU": float(resources.cpus_per_worker), "GPU": float(resources.gpus_per_worker)}
    total = ray.cluster_resources()
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    for name, amount in each.items():
        if not amount:
            continue
        asked, there = amount * resources.workers, total.get(name, 0.0)
        if asked > there:
            raise UsageError(f"the job asks for {asked:g} {name}s ({resources.workers} workers x {amount:g}), "
                             f"this {'machine' if private else 'cluster'} has {there:g}")  # fmt: skip
        slots = [int(node.get(name, 0.0) // amount) for node in nodes]
        if resources.workers > (max(slots) if resources.placement == "strict_pack" else sum(slots)):
            where = "on one node " if resources.placement == "strict_pack" else ""
            there = [node.get(name, 0.0) for node in nodes]
            raise UsageError(
                f"the job asks for {resources.workers} workers with {amount:g} {name}s each {where}"
                f"({resources.placement}); the nodes have {there}"
            )
    if resources.placement == "strict_spread" and resources.workers > len(nodes):
        raise UsageError(f"strict_spread asks for {resources.workers} nodes, the cluster has {len(nodes)}")


def bundle_of(job: JobSpec) -> dict[str, float]:
    """What each worker asks of its node."""
    resources = job.resources
    bundle: dict[str, float] = {"CPU": resources.cpus_per_worker}
    if resources.gpus_per_worker:
        bundle["GPU"] = resources.gpus_per_worker
    return bundle


def reserve(job: JobSpec) -> PlacementGroup:
    """Ask Ray for a bundle for each worker, without waiting for it."""
    return placement_group([bundle_of(job)] * job.resources.workers, strategy=job.resources.placement.upper())


def place(job: JobSpec) -> PlacementGroup:
    """A bundle for each worker, once Ray has found room for all.

    Raises:
        UsageError: it has not after `limits.start_s`.
    """
    resources, bundle, group = job.resources, bundle_of(job), reserve(job)
    if not group.wait(job.limits.start_s):
        available = {name: ray.available_resources().get(name, 0) for name in bundle}
        remove_placement_group(group)
        raise UsageError(
            f"after {job.limits.start_s:g} s still no place for {resources.workers} x {bundle} "
            f"({resources.placement}); free now: {available}; wait for other jobs or raise limits.start_s"
        )
    return group


def server_nodes(placement: str, alive: Mapping[str, bool], workers: list[str], count: int) -> list[str]:
    """The node of each of `count` parameter servers: the workers' nodes in rank order, in turn.

    Args:
        placement: colocated: on no other nodes; spread: then the other nodes too.
        alive: nodes, and whether they have CPUs; one without, such as a cluster's head, is kept free of work.
        workers: each rank's node; one that has died is passed over.
    """
    nodes = [node for node in dict.fromkeys(workers) if node in alive]
    if placement == "spread" or not nodes:
        nodes += [node for node in sorted(alive) if alive[node] and node not in nodes]
    nodes = nodes or sorted(alive)
    return [nodes[index % len(nodes)] for index in range(count)]


def in_rank_order(nodes: Mapping[int, str], here: str) -> list[int]:
    """Bundles in the order of the ranks that take them.

    Those on the driver's node come first, so that what rank 0 keeps for a recovery every few steps does not cross the
    network; then node by node.

    Args:
        nodes: bundle -> node.
        here: the driver's node.
    """
    return sorted(nodes, key=lambda bundle: (nodes[bundle] != here, nodes[bundle], bundle))
