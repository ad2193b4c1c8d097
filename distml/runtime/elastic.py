"""An elastic group on Ray: fewer workers when a node is lost, more when there is room.

    loss     a death is heard ── does its node live? ── yes: replaced in its place, as in a group of a fixed size
                                                     └─ no:  whoever is left goes on from the newest cut, once there
                                                             are seats for the fewest workers (`limits.start_s`)
    growth   every `LOOK_S` a look whether Ray has room ── seats are reserved ── the workers are asked to stop: all end
             at one version ── the driver, who has its cut, calls `regroup` ── more go on from there

Survivors keep their processes, whose imports cost seconds: they take new ranks, and build anew. Where a library keeps
something in a process that does not outlive its group (`keeps_parts`), all processes begin anew. The batch is of the
whole group, and the data order depends on seed and epoch alone: so the weights are those of a group of any size.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import ray

from distml.errors import UsageError
from distml.inject import Injection
from distml.runtime.cut import Cut, reshard
from distml.runtime.placement import check_resources
from distml.runtime.ray import ProcessLostError, RayRuntime, without_spent
from distml.runtime.seats import Room, Seat, living_nodes, nodes_of, ranked
from distml.runtime.transport import choose
from distml.spec.schema import JobSpec
from distml.tasks.sources import SourceTree

LOOK_S = 5.0  # between two looks for room
GROW_EVERY_S = 30.0  # between two changes of the size: each costs seconds


class ElasticRuntime(RayRuntime):
    """A `WorkerGroup` whose size changes within `resources.workers: {min, max}`; `size` and `job` are those of now."""

    def __init__(
        self, job: JobSpec, sources: SourceTree, address: str | None, directory: Path, injections: tuple[str, ...] = (),
    ) -> None:  # fmt: skip
        super().__init__(job, sources, address, directory, injections)
        self.elastic_job = job
        self.room = Room(job, lambda text: self.say(text), lambda: self.stop_asked)
        self.looked_at = self.changed_at = 0.0
        self.is_grouped = True  # not while it is between two sizes

    def _take_seats(self) -> None:
        """As many as there is room for."""
        fewest = self.room.range.min
        outlook = check_resources(self.elastic_job.with_workers(fewest), self.owns_ray)
        self.room.clear_of, self.room.awaits = outlook.reserved, outlook.awaits
        self._sit(self._fitting(self.room.at_least(fewest)))
        self.room.release_others(self.seats)

    def _fitting(self, seats: list[Seat]) -> list[Seat]:
        """All of them; or those of one node where the transport is for one, and enough are there.

        Raises:
            UsageError: there are not.
        """
        nodes = nodes_of(seats)
        try:
            choose(self.elastic_job.with_workers(len(seats)), nodes)
        except UsageError:
            most = max(nodes, key=nodes.count)
            fitting = [seat for seat, node in zip(seats, nodes, strict=True) if node == most]
            if len(fitting) < self.room.range.min:
                raise
            choose(self.elastic_job.with_workers(len(fitting)), [most] * len(fitting))
            return fitting
        return seats

    def _sit(self, seats: list[Seat]) -> None:
        """From now on the group has these seats."""
        self.seats, self.size = ranked(seats), len(seats)
        self.job = self.elastic_job.with_workers(self.size)
        self.job_json = self.job.model_dump_json(by_alias=True)
        self.looked_at = self.changed_at = time.monotonic()

    def _check_injections(self) -> None:
        super()._check_injections()
        for text in self.injections:
            one = Injection.parse(text)
            if one.role == "rank" and one.index >= self.size:
                self.say(f"--inject {text}: there is no rank {one.index} yet, of {self.size} workers; it waits for one")

    def _leave_seats(self) -> None:
        self.room.close()

    # --------------------------------------------------------------------------------------------------------- growth
    def _look_around(self) -> None:
        """Ask the workers to end for now, if more of them have a place."""
        now = time.monotonic()
        calm = not (self.wants_more or self.lost or self.broken or self.finished or self.stop_asked)
        if not calm or self.size == self.room.range.max or now - self.looked_at < LOOK_S:
            return
        self.looked_at = now
        if now - self.changed_at >= GROW_EVERY_S and self.room.has_more(self.size) and self._is_possible():
            self.wants_more = True
            for worker in self.workers.values():
                worker.request_stop.remote()

    def _is_possible(self) -> bool:
        """Whether the group may be on those nodes; a transport may be asked for that is for one."""
        seats = self.room.seats()
        try:
            choose(self.elastic_job.with_workers(len(seats)), nodes_of(seats))
        except UsageError as error:
            self.say(f"no more than {self.size} workers: {error}")
            self.room.release_others(self.seats)
            self.changed_at = float("inf")
            return False
        return True

    def regroup(self, cut: Cut | None) -> None:
        """All have ended for now: go on from there, in all seats that there are; or, if that fails, in those before."""
        self._guarded([], lambda: self._grow(cut))

    def _grow(self, cut: Cut | None) -> None:
        former = list(self.seats)
        try:
            self._regroup(cut)
        except UsageError as error:
            new = [seat for seat in self.seats if seat not in former]
            if self.stop_asked or not new:
                raise
            hosts = nodes_of(new)
            self.room.give_up(new, former)
            self.say(f"no more than {len(former)} workers: with others the group could not go on: {error}")
            self._regroup(cut, hoped=len(former))
            if set(hosts) & set(nodes_of(former)):  # its node cannot be passed over
                self.changed_at = float("inf")

    # ----------------------------------------------------------------------------------------------------------- loss
    def recover(self, cut: Cut | None) -> bool:
        """Replace what is lost where its place is still there; else go on with the others."""
        roles = list(self.lost)
        with self._recovering(roles):
            self._wait_for_verdict()
        if self.stop_asked:
            return True
        if self._all_seats_stay() and not self.wants_more:  # else some have heard that they are to end
            return super().recover(cut)
        self.injections, self.lost = without_spent(self.injections, roles), {}
        self._guarded(roles, lambda: self._regroup(cut))
        return True

    def _guarded(self, roles: list[str], act: Callable[[], None]) -> None:
        """`act`; whoever dies meanwhile is the next `Lost`."""
        try:
            with self._recovering(roles):
                act()
        except ProcessLostError as again:
            self._mark_lost(again.role, again.cause)
            self.lost.setdefault(again.role, again.cause)

    def _all_seats_stay(self) -> bool:
        """Whether all places are there, and where they were."""
        if not self.is_grouped:
            return False
        places = nodes_of(self.seats)
        stayed = all(places[rank] == facts["node"] for rank, facts in self.facts.items())
        return stayed and set(places) <= living_nodes()

    # ------------------------------------------------------------------------------------------------------- both
    def _regroup(self, cut: Cut | None, hoped: int | None = None) -> None:
        """Whoever is left, and new ones where there are more seats, go on from `cut` as a group of that size.

        Args:
            hoped: so many, if Ray finds places soon; None: as many as there are.
        """
        self.is_grouped = False
        if self.job.strategy.keeps_parts:
            self._end_all()
        elif self.streams:
            self._stop_streams()
        self.injections = without_spent(self.injections, list(self.lost))
        seats = self._fitting(self.room.at_least(self.room.range.min, self.size if hoped is None else hoped))
        sat = dict(zip(self.seats, (self.workers.get(rank) for rank in range(len(self.seats))), strict=True))
        self._sit(seats)
        self.room.release_others(seats)
        for seat, worker in sat.items():
            if worker is not None and seat not in self.seats:
                ray.kill(worker, no_restart=True)
        self.wants_more = False
        self._forget()
        kept = {rank: worker for rank, seat in enumerate(self.seats) if (worker := sat.get(seat)) is not None}
        self.workers = {rank: kept[rank] if rank in kept else self._worker(rank) for rank in range(self.size)}
        self._choose_again()
        self._ask({f"rank {rank}": worker.take_rank.remote(rank, self.job_json, self.injections)
                   for rank, worker in kept.items()}, "its new rank to be taken")  # fmt: skip
        self._build_workers(list(range(self.size)))
        self._check_shared_memory()
        self._check_directory()
        self.built_weights = self.workers[0].start_weights.remote() if self.servers else None
        self.is_grouped = True
        self._begin(reshard(cut, self.size) if cut is not None else None)
        self.changed_at = time.monotonic()

    def _forget(self) -> None:
        """What was heard of the processes under their former ranks."""
        for known in (self.streams, self.pings, self.heard, self.asked, self.phases, self.lost, self.broken, self.facts,
                      self.places, self.finished):  # fmt: skip
            known.clear()  # type: ignore[attr-defined]
