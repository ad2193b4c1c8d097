"""Where processes go, on Ray: what can never fit is refused, bundles are asked for and waited for, servers get nodes.

What fits is decided in `planning.py` from what nodes have; Ray then chooses nodes for the bundles, within the same
labels and clear of nodes that are for servers alone. What fits, but not now, is waited for up to `limits.start_s`; so
is what an autoscaler can add (`growth.py`).
"""

from __future__ import annotations

import os
import secrets
import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.util.placement_group import (
    NODE_ID_LABEL_KEY,
    PlacementGroup,
    placement_group,
    placement_group_table,
    remove_placement_group,
)

from distml.errors import UsageError
from distml.runtime.growth import read_growth
from distml.runtime.planning import (
    Node,
    NoPlaceError,
    accelerators_of,
    bundle_of,
    capacity,
    counted,
    number_of,
    plan_placement,
    request_of,
    server_places,
)
from distml.spec.schema import JobSpec, ParameterServerSpec

PLACED = "CREATED"
POLL_S = 0.2
FIRST_S = 1.0  # before the first line about a wait
SAY_EVERY_S = 5.0
HOLDERS_SHOWN = 3
HEAD = "node:__internal_head__"  # the resource by which Ray marks a cluster's head
OURS = "distml"


@dataclass(frozen=True)
class Outlook:
    """That a job has a place, now or later.

    Attributes:
        reserved: nodes that workers keep clear of.
        awaits: who is to add nodes that are still missing; empty: none are.
    """

    reserved: tuple[str, ...] = ()
    awaits: str = ""


# ------------------------------------------------------------------------------------------------- what a cluster has
def cluster_nodes() -> list[Node]:
    """The nodes that are alive, with what placement groups have of them."""
    used: dict[str, Counter[str]] = {}
    for group in placement_group_table().values():
        if group["state"] == PLACED:
            for bundle, node in group["bundles_to_node_id"].items():
                used.setdefault(node, Counter()).update(group["bundles"][bundle])
    return [Node(node["NodeID"], node["Resources"], used.get(node["NodeID"], {}), node["Labels"])
            for node in ray.nodes() if node["Alive"]]  # fmt: skip


def check_resources(job: JobSpec, private: bool) -> Outlook:
    """Refuse at once what this cluster can never place, saying what was asked for and what there is.

    Args:
        private: it is one that ends with the run, and nobody adds to it.

    Raises:
        UsageError: with both.
    """
    nodes, request = cluster_nodes(), request_of(job)
    try:
        return Outlook(plan_placement(nodes, request, "machine" if private else "cluster").reserved)
    except NoPlaceError:
        if private or job.limits.queue is False:
            raise
        if job.limits.queue:
            return Outlook(awaits="limits.queue")
        growth = read_growth(Path.home(), os.environ, is_head=_is_on_head(nodes))
        if growth is None:
            raise
        if growth.types is not None:  # else whether it will ever fit is not known
            more = growth.more(nodes, accelerators_of(request.each))
            plan_placement([*nodes, *more], request, "cluster, at its largest,")
        return Outlook(awaits=growth.source)


def _is_on_head(nodes: Sequence[Node]) -> bool:
    here = ray.get_runtime_context().get_node_id()
    return any(node.id == here and HEAD in node.total for node in nodes)


# ----------------------------------------------------------------------------------------------------------- bundles
def reserve(job: JobSpec, clear_of: Sequence[str] = ()) -> PlacementGroup:
    """Ask Ray for a bundle for each worker, without waiting for it.

    Args:
        clear_of: nodes that are for others.
    """
    workers, selector = job.resources.workers, selector_of(job, clear_of)
    return placement_group(
        [bundle_of(job)] * workers,
        strategy=job.resources.placement.upper(),
        name=f"{OURS} {job.name} {secrets.token_hex(4)}",
        bundle_label_selector=[selector] * workers if selector else None,
    )


def selector_of(job: JobSpec, clear_of: Sequence[str] = ()) -> dict[str, str]:
    """The labels that Ray is to look for in workers' nodes."""
    others = {NODE_ID_LABEL_KEY: f"!in({','.join(clear_of)})"} if clear_of else {}
    return {**job.resources.labels, **others}


def place(job: JobSpec, outlook: Outlook = Outlook(), say: Callable[[str], None] = lambda text: None) -> PlacementGroup:
    """A bundle for each worker, once Ray has found room for all.

    Args:
        say: told every few seconds what is waited for.

    Raises:
        UsageError: it has not after `limits.start_s`.
    """
    group = reserve(job, outlook.reserved)
    try:
        wait_for_place(group, job, say, awaits=outlook.awaits)
    except BaseException:
        remove_placement_group(group)
        raise
    return group


def wait_for_place(
    group: PlacementGroup, job: JobSpec, say: Callable[[str], None], is_over: Callable[[], bool] = lambda: False,
    awaits: str = "",
) -> None:  # fmt: skip
    """Wait until all bundles of a group have nodes: at first, and again after one was lost.

    Args:
        is_over: whether the run was asked to end.
        awaits: who is to add nodes.

    Raises:
        UsageError: they have not after `limits.start_s`, or the run was asked to end.
    """
    began, limit = time.monotonic(), job.limits.start_s
    next_line = began + FIRST_S
    while placement_group_table(group)["state"] != PLACED:
        now = time.monotonic()
        if is_over():
            raise UsageError("asked to end while it waited for a place")
        if now - began > limit:
            raise UsageError(f"after {limit:g} s still no place for {request_of(job)}; "
                             f"{situation([group], job, awaits)}; raise limits.start_s to wait longer")  # fmt: skip
        if now >= next_line:
            next_line = now + SAY_EVERY_S
            say(f"waiting for a place for {request_of(job)}: {situation([group], job, awaits)}; "
                f"{limit - (now - began):.0f} s of limits.start_s left")  # fmt: skip
        time.sleep(POLL_S)


def situation(own: Sequence[PlacementGroup], job: JobSpec, awaits: str = "") -> str:
    """What is free, who has the rest as far as Ray's table of groups says, and who adds more.

    Args:
        own: the job's groups.
    """
    request, free = request_of(job), ray.available_resources()
    known = capacity(cluster_nodes(), request, free=True)  # others than groups may have something too
    room = min([known, request.workers - 1, *(int(free.get(name, 0.0) // n) for name, n in request.each.items())])
    parts = [f"room for {room} of them now, {counted(free)} free"]
    holders = _holders(placement_group_table(), {group.id.hex() for group in own})
    if holders:
        parts.append(f"held by {', '.join(holders)}")
    if awaits:
        parts.append("nodes are still to come (limits.queue)" if awaits == "limits.queue" else f"{awaits} adds nodes")
    return "; ".join(parts)


def _holders(table: Mapping[str, Mapping[str, Any]], own: Collection[str]) -> list[str]:
    """Who has bundles, and how much: runs of distml by name; at most `HOLDERS_SHOWN`, those with most first."""
    found: dict[str, Counter[str]] = {}
    for name, group in table.items():
        if group["state"] != PLACED or name in own:
            continue
        words = group["name"].split()
        who = words[1] if len(words) == 3 and words[0] == OURS else group["name"] or "others"
        for bundle in group["bundles"].values():
            found.setdefault(who, Counter()).update(bundle)
    ordered = sorted(found.items(), key=lambda pair: (-pair[1]["GPU"], -pair[1]["CPU"], pair[0]))
    shown = [f"{who} ({counted(amounts)})" for who, amounts in ordered[:HOLDERS_SHOWN]]
    more = len(ordered) - HOLDERS_SHOWN
    return [*shown, f"{number_of(more, 'more run')}"] if more > 0 else shown


# ------------------------------------------------------------------------------------------------------ ranks, servers
def server_node(job: JobSpec, workers: Sequence[str], index: int) -> str:
    """The node of a parameter server, as the cluster is now.

    Args:
        workers: each rank's node.

    Raises:
        UsageError: there is none that it may be on.
    """
    assert isinstance(job.strategy, ParameterServerSpec)
    nodes = server_places(cluster_nodes(), job.strategy, workers)
    if not nodes:
        labels = f" and {job.strategy.server_labels}" if job.strategy.server_labels else ""
        raise UsageError(f"no node for server {index} (server_placement {job.strategy.server_placement}{labels}): "
                         "add one, or set server_placement: spread")  # fmt: skip
    return nodes[index]


def in_rank_order(nodes: Mapping[int, str], here: str) -> list[int]:
    """Bundles in the order of the ranks that take them.

    Those on the driver's node come first, so that what rank 0 keeps for a recovery every few steps does not cross the
    network; then node by node.

    Args:
        nodes: bundle -> node.
        here: the driver's node.
    """
    return sorted(nodes, key=lambda bundle: (nodes[bundle] != here, nodes[bundle], bundle))
