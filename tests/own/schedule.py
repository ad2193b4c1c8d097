"""Workers of a parameter server as pure bookkeeping: random orders of messages, deaths and evaluations for its clock.

A worker is a generator that yields what it waits for. Who moves next, and which message arrives next, is drawn: the
slices of two gradients of one worker may overtake each other, as messages to actors may.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

from own.oracle import job_of, spec_of

from distml.exchange.channel import PULL, Head, Reply
from distml.strategies.agenda import Agenda
from distml.strategies.parameter_server import Clock

Wait = Callable[[], bool] | None


def ended() -> bool:
    """What a worker that has ended waits for."""
    raise AssertionError


class World:
    """A clock, its workers, and the messages under way."""

    def __init__(self, strategy: dict[str, Any], *, workers: int, phases: int, seed: int, **spec: Any) -> None:
        block = {"name": "parameter_server", **strategy}
        job = job_of(spec_of(workers=workers, strategy=block, **spec))
        self.choices, self.phases = random.Random(seed), phases
        self.servers, self.prefetch = job.strategy.servers, job.strategy.prefetch
        self.clock = Clock(job, Agenda(job, updates_per_round=workers), phases)
        self.clock.begin(list(range(workers)))
        self.mail: list[tuple[int, int, int, Head | None]] = []
        self.replies: dict[tuple[int, int], Reply] = {}
        self.answered: set[tuple[int, int]] = set()
        self.tickets = dict.fromkeys(range(workers), 0)
        self.heads: dict[tuple[int, int], Head] = {}
        self.staleness: list[int] = []
        self.evaluated: list[int] = []
        self.entries = 0
        self.living = {rank: self.life(rank) for rank in range(workers)}
        self.waits: dict[int, Wait] = dict.fromkeys(range(workers))

    def play(self, deaths: int = 0) -> None:
        """Until every worker has ended; an AssertionError if nobody can go on."""
        while self.living:
            able = [rank for rank, wait in self.waits.items() if wait is None or wait()]
            moves = [("arrive", index) for index in range(len(self.mail))] + [("go on", rank) for rank in able]
            assert moves, f"nobody can go on: {self.clock.dump()}"
            if deaths and self.clock.finished is None and self.choices.random() < 0.02:
                deaths -= 1
                self.kill(self.choices.choice(sorted(self.living)))
                continue
            move, which = self.choices.choice(moves)
            if move == "arrive":
                server, rank, ticket, head = self.mail.pop(which)
                self.take(self.clock.arrive(server, rank, ticket, head))
            else:
                self.waits[which] = next(self.living[which], ended)
                if self.waits[which] is ended:
                    del self.living[which], self.waits[which]

    def kill(self, rank: int) -> None:
        """Another worker takes the place of one that dies; messages of the dead may still arrive."""
        self.mail = [letter for letter in self.mail if letter[1] != rank or self.choices.random() < 0.5]
        self.take(self.clock.leave(rank))
        self.tickets[rank] += 1000
        self.living[rank], self.waits[rank] = self.life(rank), None

    def take(self, entries: list[Any]) -> None:
        """Check entries and deliver their answers."""
        for entry in entries:
            self.entries += 1
            assert entry.number == self.entries
            assert entry.members == sorted(entry.replies)
            for member, reply in entry.replies.items():
                assert member not in self.answered
                self.answered.add(member)
                self.replies[member] = reply
                if not entry.dropped:
                    assert reply.staleness == entry.version - self.heads[member].read_version
                    self.staleness.append(reply.staleness)

    # --------------------------------------------------------------------------------------------------------- workers
    def push(self, rank: int, phase: int, read: int) -> tuple[int, int]:
        """Send a gradient's slices."""
        ticket = self.tickets[rank]
        self.tickets[rank] += 1
        head = self.heads[rank, ticket] = Head(rank, ticket, phase, read, 1.0, rows=1.0)
        self.mail += [(server, rank, ticket, None if server else head) for server in range(self.servers)]
        return rank, ticket

    def answer(self, key: tuple[int, int]) -> Iterator[Wait]:
        """Wait for the answer to a gradient."""
        yield lambda: key in self.replies
        return self.replies.pop(key)

    def life(self, rank: int) -> Iterator[Wait]:
        """What a worker does, from its first pull to the end of the run."""
        reply = yield from self.answer(self.push(rank, PULL, 0))
        under_way = None
        while reply.finished is None:
            read = reply.version
            yield None  # it computes
            for phase in range(self.phases):
                key = self.push(rank, phase, read)
                if phase < self.phases - 1:
                    yield from self.answer(key)
                    yield None
            if self.prefetch:
                key, under_way = under_way, key
                if key is None:
                    continue
            reply = yield from self.answer(key)
            while "evaluate" in reply.duties:  # it evaluates, ends what is under way, and pulls anew
                yield None
                self.evaluated.append(reply.version)
                finished, entries = self.clock.judge(rank, reply.version, {"eval/loss": 1.0})
                self.take(entries)
                if reply.finished is not None or (finished is not None and under_way is None):
                    return
                key, under_way = under_way, None
                reply = yield from self.answer(key or self.push(rank, PULL, 0))
                if key is not None and not reply.duties and reply.finished is None:
                    reply = yield from self.answer(self.push(rank, PULL, 0))
        self.take(self.clock.leave(rank))
