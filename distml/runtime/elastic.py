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
from distml.runtime.cut import Cut, reshard
from distml.runtime.nodes import wait_for_verdict
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

    def _take_seats(self) -> None:
        """As many as there is room for."""
        fewest = self.room.range.min
        self.room.clear_of = check_resources(self.elastic_job.with_workers(fewest), self.owns_ray).reserved
        self._sit(self.room.at_least(fewest))

    def _sit(self, seats: list[Seat]) -> None:
        """From now on the group has these seats."""
        self.seats, self.size = ranked(seats), len(seats)
        self.job = self.elastic_job.with_workers(self.size)
        self.job_json = self.job.model_dump_json(by_alias=True)
        self.looked_at = self.changed_at = time.monotonic()

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
            self.changed_at = float("inf")
            return False
        return True

    def regroup(self, cut: Cut | None) -> None:
        """All have ended for now: go on from there, in all seats that there are."""
        self._guarded([], lambda: self._regroup(cut))

    # ----------------------------------------------------------------------------------------------------------- loss
    def recover(self, cut: Cut | None) -> bool:
        """Replace what is lost where its place is still there; else go on with the others."""
        roles = list(self.lost)
        nodes, self.lost_nodes = self.lost_nodes, {}
        wait_for_verdict(nodes, self.job.limits.start_s)
        if self._all_seats_stay() and not self.wants_more:  # else some have heard that they are to end
            return super().recover(cut)
        self.injections, self.lost = without_spent(self.injections, roles), {}
        self._guarded(roles, lambda: self._regroup(cut))
        return True

    def _guarded(self, roles: list[str], act: Callable[[], None]) -> None:
        """`act`; whoever dies meanwhile is the next `Lost`."""
        try:
            act()
        except ProcessLostError as again:
            self._mark_lost(again.role, again.cause)
            self.lost.setdefault(again.role, again.cause)
        except UsageError:
            if not self.stop_asked:
                raise
            self.lost |= dict.fromkeys(roles, "it was not replaced: the run was asked to end")

    def _all_seats_stay(self) -> bool:
        """Whether all places are there, and where they were."""
        places = nodes_of(self.seats)
        stayed = all(places[rank] == facts["node"] for rank, facts in self.facts.items())
        return stayed and set(places) <= living_nodes()

    # ------------------------------------------------------------------------------------------------------- both
    def _regroup(self, cut: Cut | None) -> None:
        """Whoever is left, and new ones where there are more seats, go on from `cut` as a group of that size."""
        if self.job.strategy.keeps_parts:
            self._end_all()
        elif self.streams:
            self._stop_streams()
        self.injections = without_spent(self.injections, list(self.lost))
        seats = self.room.at_least(self.room.range.min, hoped=self.size)
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
        self._begin(reshard(cut, self.size) if cut is not None else None)
        self.changed_at = time.monotonic()

    def _forget(self) -> None:
        """What was heard of the processes under their former ranks."""
        for known in (self.streams, self.pings, self.heard, self.asked, self.phases, self.lost, self.broken, self.facts,
                      self.places, self.finished):  # fmt: skip
            known.clear()  # type: ignore[attr-defined]

    def _choose_again(self) -> None:
        """The way of the gradients between these nodes; servers that live go on, with the job of this size."""
        self.transport = choose(self.job, self._nodes())
        if self.transport.name != "object_store":
            for server in self.servers.values():
                ray.kill(server, no_restart=True)
            self.servers, self.num_servers = {}, 0
            if self.transport.name != "shared_memory" and self.segment is not None:
                self.segment.close()
                self.keeps, self.segment = False, None
            return
        self._ask({f"server {index}": server.take.remote(self.job_json) for index, server in self.servers.items()},
                  "the job of another size to be taken")  # fmt: skip
        self._start_servers()
