"""Seats: the places that are reserved for workers, one bundle of a placement group each.

An elastic group's come from several placement groups: one that it began with, and more as room was found. A seat is
lost with its node; Ray then looks for another place for it, and it is there again when one is found.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import ray
from ray.util.placement_group import PlacementGroup, placement_group_table, remove_placement_group

from distml.errors import UsageError
from distml.runtime.placement import cluster_nodes, in_rank_order, reserve, situation
from distml.runtime.planning import bundle_of, capacity, counted, request_of
from distml.spec.schema import JobSpec

READY = "CREATED"
REPLACE_S = 2.0
PROBE_S = 2.0  # how long a reservation is given before a smaller one is tried
POLL_S = 0.1
FIRST_S = 1.0  # before the first line about a wait
SAY_EVERY_S = 5.0


@dataclass(frozen=True)
class Seat:
    """A bundle of a placement group."""

    group: PlacementGroup
    bundle: int


def nodes_of(seats: Sequence[Seat]) -> list[str]:
    """The node of each seat, as Ray has it now; it may be one that has just died."""
    groups = {seat.group.id: seat.group for seat in seats}
    tables = {name: placement_group_table(group) for name, group in groups.items()}
    return [str(tables[seat.group.id]["bundles_to_node_id"].get(seat.bundle, "")) for seat in seats]


def living_nodes() -> set[str]:
    """Nodes that Ray takes for alive."""
    return {node["NodeID"] for node in ray.nodes() if node["Alive"]}


def ranked(seats: Iterable[Seat]) -> list[Seat]:
    """Seats in the order of the ranks that take them."""
    found = list(seats)
    here = ray.get_runtime_context().get_node_id()
    return [found[index] for index in in_rank_order(dict(enumerate(nodes_of(found))), here)]


def seats_of(group: PlacementGroup) -> list[Seat]:
    """All seats of a group that Ray has placed, in the order of the ranks that take them."""
    return ranked(Seat(group, bundle) for bundle in range(group.bundle_count))


class Room:
    """An elastic group's seats: what it has, and what more there is room for.

    Only `at_least` waits. `has_more` asks Ray for room, and looks at a later call whether it was given: so what is
    said to be free is reserved already, and no other job can take it while the group makes itself ready.

    Args:
        job: the spec, with a range of workers.
        say: where it is told what is waited for.
        is_over: whether a wait is to end, since the run is asked to.

    Attributes:
        clear_of: nodes that are for servers alone, or where workers could not be started.
        awaits: who is to add nodes that are still missing; empty: none are.
    """

    def __init__(self, job: JobSpec, say: Callable[[str], None], is_over: Callable[[], bool]) -> None:
        assert job.resources.elastic is not None
        self.job, self.range, self.say, self.is_over = job, job.resources.elastic, say, is_over
        self.clear_of: Sequence[str] = ()
        self.awaits = ""
        self.given_up: set[Seat] = set()
        self.groups: list[PlacementGroup] = []
        self.asked: PlacementGroup | None = None
        self.asked_at = 0.0
        self.refused: int | None = None  # that many did not fit, although as much was free

    def seats(self) -> list[Seat]:
        """Those on nodes that live, in the order in which they were reserved, no more than the most."""
        alive = living_nodes()
        reserved = [Seat(group, bundle) for group in self.groups for bundle in range(group.bundle_count)]
        living = [seat for seat, node in zip(reserved, nodes_of(reserved), strict=True)
                  if node in alive and seat not in self.given_up]  # fmt: skip
        return living[: self.range.max]

    def at_least(self, number: int, hoped: int = 0) -> list[Seat]:
        """So many seats, and more if there is room; waits for `limits.start_s`, saying so.

        Args:
            hoped: so many, where Ray finds other places for those that were lost within `REPLACE_S`.

        Raises:
            UsageError: it was in vain, or the run was asked to end.
        """
        limit, began = self.job.limits.start_s, time.monotonic()
        next_line = began + FIRST_S
        while len(seats := self.seats()) < hoped or len(seats) < number:
            now = time.monotonic()
            if len(seats) >= number and (now - began > REPLACE_S or self._free() < 1):
                break
            if self.is_over():
                raise UsageError(f"asked to end while it waited for room for {number} workers")
            if now - began > limit:
                raise UsageError(f"after {limit:g} s there is room for {len(seats)} of at least {number} workers "
                                 f"with {counted(bundle_of(self.job))} each; {self._situation(number)}; add nodes, "
                                 "wait for other jobs, or raise limits.start_s")  # fmt: skip
            if now >= next_line:
                next_line = now + SAY_EVERY_S
                self.say(f"waiting for room: {len(seats)} of at least {number} workers have a place, each asks for "
                         f"{counted(bundle_of(self.job))}; {self._situation(number)}; "
                         f"{limit - (now - began):.0f} s of limits.start_s left")  # fmt: skip
            self._find(len(seats), number)
            time.sleep(POLL_S)
        self._withdraw()
        return seats

    def _situation(self, number: int) -> str:
        return situation(self._all_groups(), self.job.with_workers(number), self.awaits)

    def has_more(self, size: int) -> bool:
        """Whether there are seats for more than `size` workers; asks for them if there may be room."""
        have = len(self.seats())
        if have < self.range.max:
            self._find(have, 0)
        else:
            self._withdraw()
        return have > size

    def _find(self, have: int, needed: int) -> None:
        """Take what Ray has given; if nothing is asked for, ask for what is free, or for what is needed."""
        if self.asked is not None:
            self._look(needed - have)
            return
        wanted = min(self.range.max - have, self._free())
        if self.refused is not None and wanted >= self.refused:  # free, but not where a worker fits
            wanted = self.refused // 2
        wanted = max(wanted, needed - have)
        self.refused = None if wanted <= 0 else self.refused
        if wanted > 0:
            self.asked, self.asked_at = reserve(self.job.with_workers(wanted), self.clear_of), time.monotonic()

    def _look(self, needed: int) -> None:
        """Whether what was asked for is there; what does not come goes, unless it is no more than is needed."""
        assert self.asked is not None
        if placement_group_table(self.asked)["state"] == READY:
            self.groups.append(self.asked)
            self.asked = self.refused = None
        elif time.monotonic() - self.asked_at > PROBE_S and self.asked.bundle_count > needed:
            remove_placement_group(self.asked)
            self.refused, self.asked = self.asked.bundle_count, None

    def _free(self) -> int:
        """How many workers there seems to be room for now."""
        request, there = request_of(self.job), ray.available_resources()
        nodes = [node for node in cluster_nodes() if node.id not in self.clear_of]
        known = capacity(nodes, request, free=True)  # others than groups may have something too
        return min([known, *(int(there.get(name, 0.0) // amount) for name, amount in request.each.items())])

    def release_others(self, used: Sequence[Seat]) -> None:
        """Give back groups of which no seat is used."""
        for group in [group for group in self.groups if all(seat.group is not group for seat in used)]:
            self.groups.remove(group)
            remove_placement_group(group)

    def give_up(self, seats: Sequence[Seat], used: Sequence[Seat]) -> None:
        """Never use these seats again, nor their nodes, except where one of the `used` seats is."""
        self.given_up |= set(seats)
        self.clear_of = sorted({*self.clear_of, *nodes_of(seats)} - {*nodes_of(used), ""})
        self.release_others(used)

    def _withdraw(self) -> None:
        """What was asked for is no longer wanted."""
        if self.asked is not None:
            remove_placement_group(self.asked)
            self.asked = None

    def _all_groups(self) -> list[PlacementGroup]:
        return [*self.groups, *([self.asked] if self.asked is not None else [])]

    def close(self) -> None:
        """Give everything back."""
        for group in self._all_groups():
            remove_placement_group(group)
        self.groups, self.asked = [], None
