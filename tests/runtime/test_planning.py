"""Placement without a cluster: every rank and server gets a node that will do, or one line says why not."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Mapping

import pytest
from own.oracle import job_of, spec_of

from distml.runtime.planning import (
    Node,
    NoPlaceError,
    Request,
    Servers,
    capacity,
    groups_that_fit,
    kinds,
    plan_placement,
    request_of,
)
from distml.spec.labels import satisfies

L4, H100 = "accelerator_type:L4", "accelerator_type:H100"
GPU_NODES = [
    Node(name, {"CPU": 48.0, "GPU": 4.0, L4: 1.0}, labels={"zone": zone})
    for name, zone in (("a", "us-west-2a"), ("b", "us-west-2b"))
]
HEAD = Node("head", {"CPU": 0.0})
CLUSTER = [*GPU_NODES, HEAD]


def refusal(nodes: list[Node], request: Request) -> str:
    with pytest.raises(NoPlaceError) as caught:
        plan_placement(nodes, request)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ------------------------------------------------------------------------------------------------------- assignments
def possible(rooms: Mapping[str, int], request: Request) -> bool:
    """The oracle: whether any assignment of workers to nodes satisfies the strategy, by trying counts of nodes."""
    if request.strategy == "strict_pack":
        return any(room >= request.workers for room in rooms.values())
    if request.strategy == "strict_spread":
        return sum(room > 0 for room in rooms.values()) >= request.workers
    return sum(rooms.values()) >= request.workers


def apart_is_possible(nodes: list[Node], rooms: Mapping[str, int], request: Request) -> bool:
    """The oracle of servers apart: some node can be left to them."""
    those = [node for node in nodes if node.total["CPU"] and satisfies(node.labels, request.servers.labels)]
    others = [{n: room for n, room in rooms.items() if n != node.id} for node in those]
    return any(possible(rest, request) for rest in others)


@pytest.mark.parametrize("apart", [False, True])
def test_there_is_a_plan_exactly_where_there_is_room_and_it_keeps_every_promise(apart):
    rng, seen = random.Random(0), Counter[tuple[str, bool]]()
    for strategy, trial in itertools.product(("pack", "spread", "strict_pack", "strict_spread"), range(150)):
        nodes = [Node(f"n{i}", {"CPU": float(rng.randrange(5))}, {"CPU": 1.0} if rng.random() < 0.1 else {},
                      {"role": rng.choice(("ps", "any"))}) for i in range(rng.randrange(1, 6))]  # fmt: skip
        labels = {"role": "ps"} if rng.random() < 0.5 else {}
        servers = Servers(rng.randrange(1, 4), "apart", labels) if apart else None
        request = Request(rng.randrange(1, 9), {"CPU": 1.0}, strategy, {}, servers)
        rooms = {node.id: int(node.total["CPU"]) for node in nodes}
        expected = apart_is_possible(nodes, rooms, request) if apart else possible(rooms, request)
        seen[strategy, expected] += 1
        if not expected:
            assert refusal(nodes, request), trial
            continue
        plan = plan_placement(nodes, request)
        shares = Counter(plan.ranks)
        free = {node.id: node.room(request.each, free=plan.fits_now) for node in nodes}
        assert len(plan.ranks) == request.workers
        assert all(count <= free[node] for node, count in shares.items())
        assert len(list(itertools.groupby(plan.ranks))) == len(shares)  # those of one node follow each other
        assert len(shares) == 1 or strategy != "strict_pack"
        assert max(shares.values()) == 1 or strategy != "strict_spread"
        if strategy == "spread":  # no node has two more than another that could take one of them
            assert all(shares[one] <= shares[other] + 1 or shares[other] >= free[other]
                       for one in shares for other in free if other not in plan.reserved)  # fmt: skip
        if apart:
            assert len(plan.servers) == request.servers.count
            assert not {*plan.servers} & {*plan.ranks}
            assert set(plan.servers) <= {n.id for n in nodes if n.total["CPU"] and satisfies(n.labels, labels)}
    assert len(seen) == 8  # both answers came for every strategy
    assert min(seen.values()) >= 5, seen


def test_what_is_free_goes_before_what_is_not():
    one, other = Node("a", {"CPU": 4.0}, {"CPU": 3.0}), Node("b", {"CPU": 2.0})
    assert plan_placement([one, other], Request(2, {"CPU": 1.0})).ranks == ("b", "b")
    assert plan_placement([one, other], Request(4, {"CPU": 1.0})).fits_now is False
    assert capacity([one, other], Request(1, {"CPU": 1.0})) == 6
    assert capacity([one, other], Request(1, {"CPU": 1.0}), free=True) == 3


def beside(rooms: list[int], workers: int, strategy: str) -> int:
    """The oracle: most groups beside each other, by trying every way to place one after the other."""
    ways = itertools.combinations_with_replacement(range(len(rooms)), workers)
    allowed = {"strict_pack": lambda way: len({*way}) == 1, "strict_spread": lambda way: len({*way}) == workers}
    most = 0
    for way in filter(allowed.get(strategy, lambda way: True), ways):
        left = [room - way.count(index) for index, room in enumerate(rooms)]
        if min(left) >= 0:
            most = max(most, 1 + beside(left, workers, strategy))
    return most


def test_groups_are_counted_as_the_placement_lays_them_out():
    """In all, whatever of it others have."""
    rng, differ = random.Random(0), Counter[str]()
    for strategy, _ in itertools.product(("pack", "spread", "strict_pack", "strict_spread"), range(40)):
        rooms, workers = [rng.randrange(4) for _ in range(rng.randrange(1, 4))], rng.randrange(1, 4)
        nodes = [Node(f"n{i}", {"CPU": float(room)}, {"CPU": 1.0}) for i, room in enumerate(rooms)]
        found = groups_that_fit(nodes, Request(workers, {"CPU": 1.0}, strategy))
        assert found == beside(rooms, workers, strategy), (strategy, rooms, workers)
        differ[strategy] += found < sum(rooms) // workers
    assert min(differ["strict_pack"], differ["strict_spread"]) >= 5
    assert differ["pack"] == differ["spread"] == 0


def test_workers_and_servers_go_where_their_labels_are():
    servers = Servers(1, "spread", {"zone": "us-west-2a"})
    request = Request(2, {"CPU": 1.0}, labels={"zone": "!us-west-2a"}, servers=servers)
    plan = plan_placement(GPU_NODES, request)
    assert plan.ranks == ("b", "b")
    assert plan.servers == ("a",)


def test_servers_apart_take_the_nodes_that_workers_can_do_without_most():
    cpu_only = Node("z", {"CPU": 8.0})
    plan = plan_placement([*CLUSTER, cpu_only], Request(8, {"CPU": 1.0, "GPU": 1.0}, servers=Servers(3, "apart")))
    assert plan.servers == ("z", "z", "z")
    assert plan.reserved == ("z",)
    less = plan_placement([*CLUSTER, cpu_only], Request(4, {"CPU": 1.0, "GPU": 1.0}, servers=Servers(3, "apart")))
    assert set(less.servers) == {"a", "z"}


# ---------------------------------------------------------------------------------------------------------- refusals
REFUSED = {
    "more than all have": (
        Request(16, {"CPU": 4.0, "GPU": 1.0}),
        "asks for 16 GPUs (16 workers x 1), this cluster has 8 (2 nodes with 4 GPUs (L4) and 48 CPUs, 1 node with no",
    ),
    "in pieces": (Request(5, {"CPU": 20.0}), "asks for 100 CPUs (5 workers x 20), this cluster has 96"),
    "too small pieces": (
        Request(2, {"CPU": 1.0, "GPU": 3.0}, labels={"zone": "us-west-2a"}), "the nodes with these labels have 4",
    ),
    "room for some": (Request(4, {"GPU": 2.0, "CPU": 20.0}), None),
    "large workers": (Request(3, {"CPU": 30.0}), "workers with 30 CPUs each (pack), and there is room for 2"),
    "no such accelerator": (
        Request(2, {"GPU": 1.0, H100: 0.001}), "no node has the accelerator H100; there is L4 (2 nodes)",
    ),
    "a near one": (Request(2, {"GPU": 1.0, "accelerator_type:L40": 0.001}), "did you mean L4?"),
    "no such value": (
        Request(2, {"CPU": 1.0}, labels={"zone": "us-west-2c"}),
        "no node has the label zone: us-west-2c that the workers ask for; it is us-west-2a (1 node), us-west-2b (1",
    ),
    "no such label": (Request(2, {"CPU": 1.0}, labels={"zome": "x"}), "nodes have the labels zone; did you mean zone?"),
    "strict_pack": (Request(5, {"GPU": 1.0}, "strict_pack"), "on one node (strict_pack), the largest has room for 4"),
    "strict_spread": (
        Request(3, {"CPU": 1.0}, "strict_spread"), "strict_spread asks for 3 nodes, the cluster has 2 that will do",
    ),
    "apart": (
        Request(8, {"GPU": 1.0}, servers=Servers(1, "apart")),
        "server_placement apart asks for a node that has CPUs and no workers",
    ),
    "servers' label": (
        Request(2, {"CPU": 1.0}, servers=Servers(1, "spread", {"zone": "x"})),
        "no node has the label zone: x that the servers ask for",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_a_refusal_names_what_is_asked_and_what_there_is(case):
    request, text = REFUSED[case]
    if text is None:
        assert plan_placement(CLUSTER, request).ranks == ("a", "a", "b", "b")
    else:
        assert text in refusal(CLUSTER, request)


def test_gpus_where_there_are_none_say_what_to_do():
    text = refusal([Node("a", {"CPU": 8.0})], Request(8, {"CPU": 1.0, "GPU": 1.0}))
    assert text.startswith("the job asks for 8 GPUs (8 workers x 1), this cluster has none (1 node with 8 CPUs)")
    assert "set resources.gpus_per_worker (of a job over jobs: base.resources.gpus_per_worker) to 0" in text


def test_many_nodes_are_few_words():
    nodes = [Node(str(i), {"CPU": float(1 + i % 7)}) for i in range(1000)]
    assert len(refusal(nodes, Request(5000, {"CPU": 1.0}))) < 250
    assert kinds(nodes).endswith("nodes with 4 CPUs, 3 other kinds")


# --------------------------------------------------------------------------------------------------------------- size
class Counted(dict[str, float]):
    """A node's resources that count how often they are looked at."""

    looks = 0

    def get(self, key: str, default: float = 0.0) -> float:  # type: ignore[override]
        Counted.looks += 1
        return super().get(key, default)


@pytest.mark.parametrize("strategy", ["pack", "spread"])
def test_a_thousand_workers_are_planned_in_work_that_is_linear_in_nodes(strategy):
    """Four looks at each node with servers apart; a plan that tried each worker on each node would take 250,000."""
    nodes = [Node(f"{i:04d}", Counted({"CPU": 96.0, "GPU": 8.0, H100: 1.0})) for i in range(250)]
    request = Request(1000, {"CPU": 4.0, "GPU": 1.0, H100: 0.001}, strategy, {}, Servers(16, "apart"))
    Counted.looks = 0
    plan = plan_placement(nodes, request)
    assert Counted.looks <= 10 * len(nodes)
    assert len(plan.ranks) == 1000
    assert len(set(plan.servers)) == 16
    assert not {*plan.ranks} & {*plan.servers}


# ------------------------------------------------------------------------------------------------------------- labels
SELECTORS = [("x", True), ("!x", False), ("in(x, y)", True), ("!in(x,y)", False), ("in(y,z)", False), ("!y", True)]


@pytest.mark.parametrize(("asked", "found"), SELECTORS)
def test_a_selector_finds_what_it_says(asked, found):
    assert satisfies({"zone": "x"}, {"zone": asked}) is found
    assert satisfies({}, {"zone": asked}) is asked.startswith("!")


def test_a_job_asks_for_what_its_spec_says():
    resources = {"workers": 2, "gpus_per_worker": 1, "accelerator": "nvidia-l4", "labels": {"zone": "x"}}
    request = request_of(job_of(spec_of(resources=resources)))
    assert request.each == {"CPU": 1.0, "GPU": 1.0, L4: 0.001}
    assert (request.labels, request.servers) == ({"zone": "x"}, None)
