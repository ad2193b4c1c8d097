"""Which node each rank and each parameter server goes to, or why there is none: decided from what nodes have. No ray.

A request is held against nodes in this order, and what fails first is what the refusal is about: accelerators and
labels that no node has; GPUs where there are none; more than all nodes have together; workers that do not fit into the
pieces that are there; the strict placements; servers that need nodes of their own. Work is linear in nodes and workers.
"""

from __future__ import annotations

import bisect
import difflib
from collections import Counter, deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from distml.errors import UsageError
from distml.spec.accelerators import similar_accelerators
from distml.spec.labels import satisfies, values_of
from distml.spec.schema import JobSpec, ParameterServerSpec

ACCELERATOR = "accelerator_type:"  # what Ray calls a node's resource that says which accelerator it has
ACCELERATOR_SHARE = 0.001  # of that resource, as Ray's own option `accelerator_type` asks for it
KINDS_SHOWN = 4
LABELS_SHOWN = 5


class NoPlaceError(UsageError):
    """No nodes, however free, have room for a request: one line with what is asked for and what there is."""


@dataclass(frozen=True)
class Node:
    """A node of a cluster.

    Args:
        id: Ray's.
        total: resource -> amount that it has.
        used: resource -> amount of it that somebody is known to have.
        labels: name -> value.
    """

    id: str
    total: Mapping[str, float]
    used: Mapping[str, float] = field(default_factory=dict)
    labels: Mapping[str, str] = field(default_factory=dict)

    def room(self, each: Mapping[str, float], free: bool) -> int:
        """How many times `each` fits into what it has, or into what of it is free."""
        used: Mapping[str, float] = self.used if free else {}
        return min(int((self.total.get(name, 0.0) - used.get(name, 0.0) + 1e-9) // amount)
                   for name, amount in each.items())  # fmt: skip

    @property
    def accelerators(self) -> list[str]:
        """What it has, as Ray names them."""
        return sorted(name.removeprefix(ACCELERATOR) for name in self.total if name.startswith(ACCELERATOR))


@dataclass(frozen=True)
class Servers:
    """Parameter servers, which reserve nothing.

    Args:
        placement: spread, colocated or apart.
        labels: that their nodes must have.
    """

    count: int
    placement: str
    labels: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Request:
    """What a job asks for.

    Args:
        each: resource -> amount, of each worker.
        strategy: pack, spread, strict_pack or strict_spread.
        labels: that the workers' nodes must have.
    """

    workers: int
    each: Mapping[str, float]
    strategy: str = "pack"
    labels: Mapping[str, str] = field(default_factory=dict)
    servers: Servers | None = None

    def __str__(self) -> str:
        things = counted(self.each, "one")
        accelerators = "".join(f", {name}" for name in accelerators_of(self.each))
        labels = "".join(f", {key}: {asked}" for key, asked in self.labels.items())
        return f"{self.workers} x {things}{accelerators}{labels} ({self.strategy})"


@dataclass(frozen=True)
class Plan:
    """Where everything goes.

    Attributes:
        ranks: the node of each rank; those of one node follow each other.
        servers: the node of each server.
        reserved: nodes that workers keep clear of, for servers that are apart.
        fits_now: whether there is room now, as far as is known; else when others have ended.
    """

    ranks: tuple[str, ...]
    servers: tuple[str, ...] = ()
    reserved: tuple[str, ...] = ()
    fits_now: bool = True


def request_of(job: JobSpec) -> Request:
    """A training job's request; for its parameter servers too, where it says where they are."""
    resources, strategy = job.resources, job.strategy
    wanted = None
    if isinstance(strategy, ParameterServerSpec) and strategy.places_servers:
        wanted = Servers(strategy.servers, strategy.server_placement, strategy.server_labels)
    return Request(resources.workers, bundle_of(job), resources.placement, resources.labels, wanted)


def bundle_of(job: JobSpec) -> dict[str, float]:
    """What one worker reserves."""
    resources = job.resources
    each = {"CPU": float(resources.cpus_per_worker), "GPU": float(resources.gpus_per_worker)}
    if resources.accelerator is not None:
        each[ACCELERATOR + resources.accelerator] = ACCELERATOR_SHARE
    return {name: amount for name, amount in each.items() if amount}


# ------------------------------------------------------------------------------------------------------------- planning
def plan_placement(nodes: Sequence[Node], request: Request, cluster: str = "cluster") -> Plan:
    """The nodes of all ranks and servers: those that are free now, else any that will do once others have ended.

    Args:
        nodes: alive.
        cluster: what the nodes are together, in a refusal.

    Raises:
        NoPlaceError: there is no room however free they are.
    """
    for free in (True, False):
        plan = _attempt(nodes, request, free)
        if plan is not None:
            return plan
    raise NoPlaceError(_why(nodes, request, cluster))


def capacity(nodes: Iterable[Node], request: Request, free: bool = False) -> int:
    """Workers that the nodes have room for in all, or now; whatever the placement."""
    return sum(room for _, room in _rooms(nodes, request, free))


def groups_that_fit(nodes: Iterable[Node], request: Request) -> int:
    """Groups of a request's workers that the nodes have room for beside each other, in all, as its placement asks.

    strict_spread: g groups have a place where no node needs to take two workers of one, that is where
    sum(min(room, g)) >= g * workers over the nodes; this holds up to some g and for none above.
    """
    rooms, wanted = [room for _, room in _rooms(nodes, request, free=False)], request.workers
    if request.strategy == "strict_pack":
        return sum(room // wanted for room in rooms)
    most = sum(rooms) // wanted
    if request.strategy != "strict_spread":
        return most
    return bisect.bisect_left(range(1, most + 1), True, key=lambda g: sum(min(room, g) for room in rooms) < g * wanted)


def _rooms(nodes: Iterable[Node], request: Request, free: bool) -> list[tuple[Node, int]]:
    """The nodes that can have workers, with how many; most first."""
    rooms = [(node, node.room(request.each, free)) for node in nodes if satisfies(node.labels, request.labels)]
    return sorted(((node, room) for node, room in rooms if room > 0), key=lambda pair: (-pair[1], pair[0].id))


def _attempt(nodes: Sequence[Node], request: Request, free: bool) -> Plan | None:
    rooms, servers = _rooms(nodes, request, free), request.servers
    reserved: list[str] = []
    if servers is not None and servers.placement == "apart":
        reserved = _reserve(nodes, rooms, request, servers)
        rooms = [pair for pair in rooms if pair[0].id not in reserved]
        if not reserved:
            return None
    if not _is_enough(request, sum(room for _, room in rooms), rooms[0][1] if rooms else 0, len(rooms)):
        return None
    ranks = _assign(rooms, request)
    if servers is None:
        return Plan(tuple(ranks), fits_now=free)
    places = _place_servers(nodes, servers, ranks)
    return Plan(tuple(ranks), tuple(places), tuple(reserved), free) if places else None


def _is_enough(request: Request, total: int, largest: int, count: int) -> bool:
    """Whether nodes with room for `total` workers, at most `largest` on one, `count` with any, do for the placement."""
    have = {"strict_pack": largest, "strict_spread": count}.get(request.strategy, total)
    return have >= request.workers


def _reserve(
    nodes: Sequence[Node], rooms: Sequence[tuple[Node, int]], request: Request, servers: Servers
) -> list[str]:  # fmt: skip
    """Nodes for servers without workers: those of least use to workers, as many as these can do without."""
    room_of = {node.id: room for node, room in rooms}
    total, count = sum(room_of.values()), len(room_of)
    left = deque(rooms)  # the first of them is the largest that is not taken
    taken: list[str] = []
    gone: set[str] = set()
    for name in sorted(_for_servers(nodes, servers), key=lambda name: (room_of.get(name, 0), name)):
        room = room_of.get(name, 0)
        total, count = total - room, count - (room > 0)
        while left and (left[0][0].id == name or left[0][0].id in gone):
            left.popleft()
        if len(taken) == servers.count or not _is_enough(request, total, left[0][1] if left else 0, count):
            break
        taken.append(name)
        gone.add(name)
    return taken


def _assign(rooms: Sequence[tuple[Node, int]], request: Request) -> list[str]:
    """The node of each rank; there is room."""
    wanted = request.workers
    if request.strategy == "strict_pack":
        return [min((pair for pair in rooms if pair[1] >= wanted), key=lambda pair: pair[1])[0].id] * wanted
    shares = _even_shares(rooms, wanted) if "spread" in request.strategy else _full_shares(rooms, wanted)
    return [node.id for (node, _), share in zip(rooms, shares, strict=True) for _ in range(share)]


def _full_shares(rooms: Sequence[tuple[Node, int]], wanted: int) -> list[int]:
    """Workers of each node, the first ones full."""
    shares = []
    for _, room in rooms:
        shares.append(min(room, wanted))
        wanted -= shares[-1]
    return shares


def _even_shares(rooms: Sequence[tuple[Node, int]], wanted: int) -> list[int]:
    """Workers of each node, as even as room allows; `rooms` falls."""
    shares = [0] * len(rooms)
    for index in range(len(rooms) - 1, -1, -1):  # the smallest first: what it cannot take, the larger ones do
        shares[index] = min(rooms[index][1], wanted // (index + 1))
        wanted -= shares[index]
    return shares


def server_places(nodes: Iterable[Node], strategy: ParameterServerSpec, workers: Sequence[str]) -> list[str]:
    """The node of each server of a strategy, given those of the ranks; empty if no node will do."""
    servers = Servers(strategy.servers, strategy.server_placement, strategy.server_labels)
    return _place_servers(nodes, servers, workers)


def _place_servers(nodes: Iterable[Node], servers: Servers, workers: Sequence[str]) -> list[str]:
    return server_nodes(servers.placement, _for_servers(nodes, servers), workers, servers.count)


def _for_servers(nodes: Iterable[Node], servers: Servers) -> dict[str, bool]:
    """Nodes with the servers' labels, and whether they have CPUs; without those one is no place for servers apart."""
    found = {node.id: node.total.get("CPU", 0.0) > 0 for node in nodes if satisfies(node.labels, servers.labels)}
    return {name: cpus for name, cpus in found.items() if cpus} if servers.placement == "apart" else found


def server_nodes(placement: str, alive: Mapping[str, bool], workers: Sequence[str], count: int) -> list[str]:
    """The node of each of `count` parameter servers: the workers' nodes in rank order, in turn; empty if none will do.

    Args:
        placement: colocated: on no other nodes; spread: then the other nodes too; apart: only these.
        alive: nodes that may have servers, and whether they have CPUs; one without, such as a cluster's head, is kept
            free of work.
        workers: each rank's node; one that has died is passed over.
    """
    nodes = [node for node in dict.fromkeys(workers) if node in alive] if placement != "apart" else []
    if placement != "colocated" or not nodes:
        nodes += [node for node in sorted(alive) if alive[node] and node not in {*nodes, *workers}]
    if placement != "apart":
        nodes = nodes or sorted(alive)
    return [nodes[index % len(nodes)] for index in range(count)] if nodes else []


# ------------------------------------------------------------------------------------------------------------- refusals
def _why(nodes: Sequence[Node], request: Request, cluster: str) -> str:
    """Why there is no room, with what is asked for and what there is."""
    fitting = [node for node in nodes if satisfies(node.labels, request.labels)]
    rooms = _rooms(nodes, request, free=False)
    for reason in (
        _no_gpus(nodes, request, cluster),
        _no_accelerator(nodes, request),
        _no_label(nodes, request.labels, "workers"),
        _too_few(nodes, fitting, request, cluster),
        _too_small(fitting, rooms, request),
        _strict(fitting, rooms, request, cluster),
        _no_servers(nodes, request),
    ):
        if reason is not None:
            return reason
    raise AssertionError(f"{request} has room on {kinds(nodes)}")


def _no_gpus(nodes: Sequence[Node], request: Request, cluster: str) -> str | None:
    each = request.each.get("GPU", 0.0)
    if not each or any(node.total.get("GPU", 0.0) for node in nodes):
        return None
    return (f"the job asks for {request.workers * each:g} GPUs ({request.workers} workers x {each:g}), this "
            f"{cluster} has none ({kinds(nodes)}); set resources.gpus_per_worker (of a job over jobs: "
            "base.resources.gpus_per_worker) to 0 for CPUs")  # fmt: skip


def _no_accelerator(nodes: Sequence[Node], request: Request) -> str | None:
    there = Counter(name for node in nodes for name in node.accelerators)
    for asked in accelerators_of(request.each):
        if asked not in there:
            found = ", ".join(f"{name} ({number_of(count, 'node')})" for name, count in sorted(there.items()))
            similar = similar_accelerators(asked, tuple(there))
            meant = f"; did you mean {similar[0]}?" if similar else ""
            return (f"no node has the accelerator {asked}; there is {found or f'none on {kinds(nodes)}'}"
                    f"{meant or '; change or remove resources.accelerator'}")  # fmt: skip
    return None


def _no_label(nodes: Sequence[Node], labels: Mapping[str, str], who: str) -> str | None:
    key = next((key for key in labels if not any(satisfies(n.labels, {key: labels[key]}) for n in nodes)), None)
    if key is None:
        if any(satisfies(node.labels, labels) for node in nodes):
            return None
        asked = " and ".join(f"{key}: {value}" for key, value in labels.items())
        return f"no node has {asked} together, which the {who}' labels ask for; there are {kinds(nodes)}"
    there = Counter(node.labels[key] for node in nodes if key in node.labels)
    if there:
        shown = sorted(there.items())[:LABELS_SHOWN]
        parts = [f"{value} ({number_of(count, 'node')})" for value, count in shown]
        found = f"it is {', '.join(parts + ['...'] * (len(there) > LABELS_SHOWN))}"
        meant = difflib.get_close_matches(values_of(labels[key])[1][0], list(there), n=1)
    else:
        names = sorted({name for node in nodes for name in node.labels if not name.startswith("ray.io/")})
        found = f"nodes have the labels {', '.join(names[:LABELS_SHOWN]) or 'of Ray alone'}"
        meant = difflib.get_close_matches(key, names, n=1)
    hint = f"did you mean {meant[0]}?" if meant else "start nodes with ray start --labels, or change the spec's"
    return f"no node has the label {key}: {labels[key]} that the {who} ask for; {found}; {hint}"


def _too_few(nodes: Sequence[Node], fitting: Sequence[Node], request: Request, cluster: str) -> str | None:
    """Of one resource more than all have together."""
    workers = request.workers
    for name, amount in request.each.items():
        there = sum(node.total.get(name, 0.0) for node in fitting if _has_accelerators(node, request))
        if name.startswith(ACCELERATOR) or amount * workers <= there:
            continue
        where = f"this {cluster} has" if len(fitting) == len(nodes) else "the nodes with these labels have"
        names = accelerators_of(request.each)
        if names:
            where = f"the nodes with {names[0]} have"
        return (f"the job asks for {amount * workers:g} {name}s ({workers} workers x {amount:g}), {where} {there:g}"
                f"{f' ({kinds(fitting)})' if fitting else ''}")  # fmt: skip
    return None


def _too_small(fitting: Sequence[Node], rooms: Sequence[tuple[Node, int]], request: Request) -> str | None:
    """Enough in all, but in pieces."""
    room = sum(room for _, room in rooms)
    if request.workers <= room:
        return None
    return (f"the job asks for {request.workers} workers with {counted(request.each, 'one')} each "
            f"({request.strategy}), and there is room for {room}: {kinds(fitting)}")  # fmt: skip


def _strict(
    fitting: Sequence[Node], rooms: Sequence[tuple[Node, int]], request: Request, cluster: str
) -> str | None:  # fmt: skip
    if request.strategy == "strict_spread" and request.workers > len(rooms):
        those = f"the {cluster} has {len(rooms)}" + (" that will do" if len(rooms) < len(fitting) else "")
        return f"strict_spread asks for {request.workers} nodes, {those}: {kinds(fitting)}; set spread"
    largest = rooms[0][1] if rooms else 0
    if request.strategy == "strict_pack" and request.workers > largest:
        return (f"the job asks for {request.workers} workers with {counted(request.each, 'one')} each on one node "
                f"(strict_pack), the largest has room for {largest}: {kinds(fitting)}; set pack")  # fmt: skip
    return None


def _no_servers(nodes: Sequence[Node], request: Request) -> str | None:
    servers = request.servers
    if servers is None:
        return None
    found = _no_label(nodes, servers.labels, "servers")
    if found is not None:
        return found
    those = "with strategy.server_labels " if servers.labels else ""
    return (f"server_placement apart asks for a node {those}that has CPUs and no workers, and {request} leave none: "
            f"{kinds(nodes)}; add a node, or set server_placement: spread")  # fmt: skip


def _has_accelerators(node: Node, request: Request) -> bool:
    return all(node.total.get(ACCELERATOR + name) for name in accelerators_of(request.each))


# ---------------------------------------------------------------------------------------------------------------- words
def accelerators_of(each: Mapping[str, float]) -> list[str]:
    """The accelerators that a worker asks for."""
    return [name.removeprefix(ACCELERATOR) for name in each if name.startswith(ACCELERATOR)]


def counted(amounts: Mapping[str, float], none: str = "nothing") -> str:
    """GPUs and CPUs as in a sentence: `4 GPUs and 48 CPUs`."""
    shown = [(name, amounts.get(name, 0.0)) for name in ("GPU", "CPU")]
    return " and ".join(f"{amount:g} {name}{'' if amount == 1 else 's'}" for name, amount in shown if amount) or none


def number_of(count: int, name: str) -> str:
    """`1 node`, `2 nodes`."""
    return f"{count} {name}{'' if count == 1 else 's'}"


def kinds(nodes: Sequence[Node]) -> str:
    """The nodes by what they have, few words for however many: `2 nodes with 4 GPUs (L4) and 48 CPUs, 1 node with 8
    CPUs`."""
    found: Counter[tuple[float, float, tuple[str, ...]]] = Counter(
        (node.total.get("GPU", 0.0), node.total.get("CPU", 0.0), tuple(node.accelerators)) for node in nodes
    )
    parts = []
    for (gpus, cpus, accelerators), count in sorted(found.items(), key=lambda row: (-row[0][0], -row[0][1], row[0][2])):
        types = f" ({', '.join(accelerators)})" if accelerators else ""
        graphics = counted({"GPU": gpus}) + types if gpus else ", ".join(accelerators)
        has = " and ".join(part for part in (graphics, counted({"CPU": cpus}) if cpus else "") if part)
        parts.append(f"{number_of(count, 'node')} with {has or 'no CPUs'}")
    more = [f"{number_of(len(parts) - KINDS_SHOWN, 'other kind')}"] if len(parts) > KINDS_SHOWN else []
    return ", ".join(parts[:KINDS_SHOWN] + more) or "no nodes"
