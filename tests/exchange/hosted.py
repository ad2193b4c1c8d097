"""Workers of one host as threads: each maps the segment for itself, as processes do, without their start-up time."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from typing import Any

from own.oracle import OWN, job_of

from distml.exchange.segment import Segment
from distml.exchange.shared_memory import Host, SharedMemoryGroup
from distml.loop import Trainer
from distml.strategies.agenda import Agenda
from distml.strategies.shared_servers import SharedServers
from distml.tasks.build import build_task
from distml.tasks.sources import SourceTree

PATIENCE_S = 20.0


def together(works: list[Callable[[], Any]]) -> list[Any]:
    """Run all at once, each in a thread; what they return, or the first exception."""
    found: list[Any] = [None] * len(works)

    def run(index: int) -> None:
        try:
            found[index] = works[index]()
        except BaseException as error:
            found[index] = error

    threads = [threading.Thread(target=run, args=(index,), daemon=True) for index in range(len(works))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(2 * PATIENCE_S)
        assert not thread.is_alive(), "a worker hangs"
    errors = [value for value in found if isinstance(value, BaseException)]
    if errors:
        raise errors[0]
    return found


def groups(ranks: list[int], regions, hosts: list[list[int]], wires=None) -> list[SharedMemoryGroup]:
    """One group object per rank of a host."""
    first = Segment.create(regions)
    segments = [first, *(Segment.open(os.getpid(), first.descriptor, regions) for _ in ranks[1:])]
    found = []
    for segment, rank in zip(segments, ranks, strict=True):
        host = Host(segment, ranks, rank, [os.getpid()] * len(ranks), PATIENCE_S)
        found.append(SharedMemoryGroup(host, hosts, (wires or {}).get(rank)))
    return found


def trainers(
    spec: dict[str, Any],
    keeps: bool = False,
    snapshot_every: int | None = None,
    hosts: list[list[int]] | None = None,
    wires=None,
):
    """A trainer per worker of `spec`, in shared memory, connected."""
    job = job_of(spec)
    SourceTree.collect(job.task, OWN).install()
    size = job.resources.workers
    hosts = hosts or [list(range(size))]
    found = [
        Trainer(job, build_task(job), rank, size, None, snapshot_every, in_shared_memory=True) for rank in range(size)
    ]
    for trainer in found:
        trainer.build()
    for ranks in hosts:
        regions = found[ranks[0]].strategy.regions(len(ranks), keeps)
        for group in groups(ranks, regions, hosts, wires):
            strategy = found[group.rank].strategy
            channel = None
            if not job.strategy.is_synchronous:
                agenda = Agenda(job, **strategy.agenda_arguments)
                state = "new" if group.host.index == 0 else "joined"
                channel = SharedServers(job, strategy.flat, strategy.carried, agenda, len(strategy.phases),
                                        group.host, state, 1)  # fmt: skip
            found[group.rank].connect(group, channel)
    return found


def advance(trainer: Trainer) -> list[Any]:
    """Train to the end; the events."""
    events = list(trainer.advance())
    trainer.strategy.leave()
    return events
