"""How gradients travel in a run on Ray: chosen from the spec and from which worker is on which node. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from distml.errors import UsageError
from distml.spec.schema import JobSpec, ParameterServerSpec
from distml.spec.zero import ZeroSpec


@dataclass(frozen=True)
class Transport:
    """One way, and why it was taken.

    Attributes:
        name: none, shared_memory, process_group or object_store.
        reason: for the log.
        hosts: the ranks of each node, in the order of their first ranks.
    """

    name: str
    reason: str
    hosts: tuple[tuple[int, ...], ...]

    def __str__(self) -> str:
        return f"{self.name} ({self.reason})" if self.reason else self.name


def by_host(nodes: Sequence[str]) -> tuple[tuple[int, ...], ...]:
    """Ranks by node: `nodes[rank]` is a rank's."""
    found: dict[str, list[int]] = {}
    for rank, node in enumerate(nodes):
        found.setdefault(node, []).append(rank)
    return tuple(tuple(ranks) for ranks in found.values())


def wire_of(job: JobSpec) -> str:
    """What carries gradients between hosts."""
    return "object_store" if isinstance(job.strategy, ParameterServerSpec) else "process_group"


def choose(job: JobSpec, nodes: Sequence[str]) -> Transport:
    """The transport for workers on these nodes.

    Raises:
        UsageError: shared_memory is asked for, and the workers do not share a host.
    """
    hosts = by_host(nodes)
    if job.strategy.name == "single" or (len(nodes) == 1 and wire_of(job) == "process_group"):
        return Transport("none", "one worker", hosts)
    against = why_not_shared(job, hosts)
    if isinstance(job.strategy, ZeroSpec):
        return Transport("process_group", f"{details(job, 'process_group')}: DeepSpeed's", hosts)
    if job.transport == "shared_memory" and against is not None:
        raise UsageError(f"transport shared_memory: {against}; set transport to {wire_of(job)} or auto")
    if job.transport not in ("auto", "shared_memory") or against is not None:
        name = wire_of(job)
        return Transport(name, f"{details(job, name)}: {against if job.transport == 'auto' else 'asked for'}", hosts)
    return Transport("shared_memory", shared_reason(job, hosts), hosts)


def why_not_shared(job: JobSpec, hosts: tuple[tuple[int, ...], ...]) -> str | None:
    """What speaks against shared memory, or None."""
    if job.resources.gpus_per_worker:
        return "the gradients are on GPUs"
    for key in ("compression", "prefetch"):
        if getattr(job.strategy, key, None) and (len(hosts) == 1 or isinstance(job.strategy, ParameterServerSpec)):
            return f"{key} is for a wire"
    if isinstance(job.strategy, ParameterServerSpec) and job.strategy.places_servers:
        return "servers have nodes of their own" if job.strategy.server_placement == "apart" else "servers have labels"
    if len(hosts) > 1 and isinstance(job.strategy, ParameterServerSpec):
        return f"the workers are on {len(hosts)} hosts"
    if len(hosts) > 1 and max(map(len, hosts)) == 1:
        return f"one worker on each of {len(hosts)} hosts"
    return None


def shared_reason(job: JobSpec, hosts: tuple[tuple[int, ...], ...]) -> str:
    """What is shared, and what takes the place of servers."""
    workers = sum(map(len, hosts))
    if len(hosts) > 1:
        return f"{workers} workers on {len(hosts)} hosts, gloo between the hosts"
    if isinstance(job.strategy, ParameterServerSpec):
        return f"{workers} worker{'s' if workers > 1 else ''} on one host, who are the servers too"
    return f"{workers} workers on one host"


def details(job: JobSpec, name: str) -> str:
    """What a wire is made of."""
    if name == "process_group":
        return "nccl" if job.resources.gpus_per_worker else "gloo"
    assert isinstance(job.strategy, ParameterServerSpec)
    return f"{job.strategy.servers} server{'s' if job.strategy.servers > 1 else ''}"


def fall_back(job: JobSpec, transport: Transport, lacking: str) -> Transport:
    """The wire instead, because of what a host lacks.

    Raises:
        UsageError: shared_memory was asked for.
    """
    name = wire_of(job)
    if job.transport == "shared_memory":
        raise UsageError(f"transport shared_memory: {lacking}; free or enlarge it, or set transport to {name}")
    return Transport(name, f"{details(job, name)}: {lacking}", transport.hosts)
