"""Asynchronous parameter servers in shared memory, without a server: whoever holds the lock is the servers.

    worker: backward ▶ lock ▶ clock.arrive ▶ for each entry: a free buffer := update(newest buffer, gradients) ▶ publish
            ▶ unlock ▶ go on with the very buffer that was published

Weights are never changed in place and never copied for a pull: every update writes a version of its own into a buffer
that nobody reads, and a worker computes on the buffer it was answered with until its next exchange. W workers read at
most W buffers, so W + 1 are enough. The clock is the one that server actors have; its bookkeeping lies in the segment
as plain values (Python's marshal), in two places of which the unfinished one is never the valid one. Who was the last
to write it goes on with what it has.

Who unblocks whom: the kernel hands on the lock (flock) when its holder dies. A worker that died under it may have left
moments or sums torn: whoever comes next sees the mark, and the group breaks up to go back to a snapshot. One that died
elsewhere is noticed by the next to come, who lets the clock know.

Shapes: W workers, N elements.
"""

from __future__ import annotations

import fcntl
import marshal
import math
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor

from distml.exchange.channel import Head, News, PeerLost, Reply
from distml.exchange.flat import TAIL, Carried, FlatModel, from_numpy, to_numpy
from distml.exchange.layout import Array
from distml.exchange.segment import KEPT, Regions, kept_regions
from distml.exchange.shared_memory import POLL_S, Host, Words, host_regions, is_finite
from distml.spec.schema import JobSpec, OptimizerSpec, ParameterServerSpec
from distml.strategies.agenda import Agenda
from distml.strategies.in_place import pieces
from distml.strategies.optimizer import FlatOptimizer
from distml.strategies.parameter_server import Clock
from distml.strategies.shard import Entry, Shard

BOOK_BYTES = 2**22  # the clock, and answers that wait to be taken
ELEMENT_BYTES = 24  # that an element of a buffer may take there
RELEASED, EVENTS, WRITING, PLACE, FINISHED = range(5)  # words of "server_words"


def async_regions(flat: FlatModel, carried: Carried, moments: list[str], size: int, keeps: bool) -> Regions:
    """The segment of `size` workers: everyone's gradients, buffers of weights, moments.

    `keeps`: states are kept for a recovery; else only the moments of those that a worker is about to hand over.
    """
    numel, kind = flat.layout.numel, str(flat.weights.dtype).removeprefix("torch.")
    return Regions.build(
        [
            *host_regions(size),
            ("server_words", 5 * Words.PER_LINE, "uint32"),
            ("pids", size, "int64"),
            ("books", 2 * BOOK_BYTES, "uint8"),
            ("carried", size * carried.average_vector().numel(), "float64"),
            *((f"gradients-{index}", flat.gradients.numel(), kind) for index in range(size)),
            *((f"weights-{index}", numel, kind) for index in range(size + 1)),
            *((f"moment-{name}", numel, kind) for name in moments),
            *(row for row in kept_regions(numel, kind, moments, 1) if keeps or not row[0].endswith("-weights")),
        ]
    )


@dataclass
class Book:
    """What the holder of the lock knows besides the clock.

    Attributes:
        newest: the buffer of the newest version.
        readers: rank -> the buffer that it computes on.
        answers: [rank, ticket, reply, buffer] that wait to be taken.
        updates: steps of the optimiser.
        captures: [version, clock's state, updates, owner] of the state in each slot, or None. The owner is who has yet
            to take it: what it evaluates or what becomes a checkpoint is not overwritten before. -1: nobody.
    """

    newest: int = 0
    readers: dict[int, int] = field(default_factory=dict)
    answers: list[tuple[int, int, Reply, int]] = field(default_factory=list)
    updates: int = 0
    captures: list[list[Any] | None] = field(default_factory=lambda: [None] * KEPT)


class SharedServers:
    """A worker's way to the servers that the workers themselves are (a `Channel`).

    Args:
        job: the spec.
        flat, carried: of the replica; its gradients move into the segment, its weights with each answer.
        agenda: budgets, evaluations, duties.
        num_phases: exchanges per step.
        host: this worker's.
        state: how to begin: "new" by the one who created the segment, "joined" by who connects with it, "rejoined"
            by one that takes a dead worker's place.
        generation: how often the run has been connected.
    """

    clears_gradients = True

    def __init__(
        self, job: JobSpec, flat: FlatModel, carried: Carried, agenda: Agenda, num_phases: int, host: Host,
        state: str, generation: int,
    ) -> None:  # fmt: skip
        assert isinstance(job.strategy, ParameterServerSpec)
        self.job, self.flat, self.host, self.rank = job, flat, host, host.ranks[host.index]
        self.bytes_sent, self.generation, self.creates = 0, generation, state == "new"
        segment = host.segment
        self.words = Words(segment.array("server_words"))
        self.books = segment.array("books").reshape(2, BOOK_BYTES)
        self.pids = segment.array("pids")
        self.everyones = [segment.tensor(f"gradients-{index}") for index in range(host.size)]
        self.buffers = [segment.tensor(f"weights-{index}") for index in range(host.size + 1)]
        self.carried_rows = segment.array("carried").reshape(host.size, -1)
        self.clock = Clock(job.model_copy(update={"strategy": job.strategy.model_copy(update={"servers": 1})}),
                           agenda, num_phases)  # fmt: skip
        self.book = Book()
        self.read_place = -1  # PLACE when this worker last read or wrote the bookkeeping
        self.taken: dict[int, tuple[dict[str, Array], dict[str, Any]]] = {}  # states that this worker has yet to give
        self.keeps = "kept-0-weights" in segment.regions.places
        self._lay_out(agenda.budget_steps)
        if state == "new":
            self._begin(flat.weights, None)
        if state == "rejoined":
            with self._locked(f"rank {self.rank} to take its place again"):
                self._forget(self.rank)
        self.pids[host.index] = os.getpid()
        flat.bind(flat.weights.clone(), self.everyones[host.index])

    def _lay_out(self, budget: int | None) -> None:
        job, layout, segment = self.job, self.flat.layout, self.host.segment
        self.shards = []
        for own in pieces(layout, 0, 1):
            part = slice(*own)
            optimizer = FlatOptimizer(job.optimizer, layout, own, self.buffers[0][part], budget)
            optimizer.moments = {name: segment.tensor(f"moment-{name}")[part] for name in optimizer.moments}
            shard = Shard(job, layout, own, budget)
            shard.attach(self.buffers[0][part], optimizer, 0)
            self.shards.append(shard)
        self.moment_names = list(self.shards[0].optimizer.moments)

    # ----------------------------------------------------------------------------------------------------------- state
    def _begin(self, weights: Tensor, shared: Mapping[str, Any] | None) -> None:
        """Before anybody takes part: the first version, moments and the clock."""
        self.book = Book()
        self.buffers[0].copy_(weights)
        if shared is not None:
            for name in self.moment_names:
                moment, saved = self.host.segment.tensor(f"moment-{name}"), shared["moments"].get(name)
                moment.copy_(from_numpy(saved)) if saved is not None else moment.zero_()
            self.clock.load_state(shared["clock"])
            self.book.updates = shared["clock"]["updates"]
        self.clock.begin(list(self.host.ranks))
        self._write()

    def load(self, shared: Mapping[str, Any]) -> None:
        """Begin from a shared half; one worker does it for all."""
        if self.creates:
            self._begin(from_numpy(shared["weights"]), shared)

    def live_optimizer(self) -> OptimizerSpec:
        """This worker's, when it is the servers."""
        return self.shards[0].optimizer.spec

    def captured(self, version: int, carried: dict[str, Array]) -> dict[str, Any] | None:
        """The shared half at the version that this worker reads, or None if its moments are no longer there."""
        if version in self.taken:
            moments, clock = self.taken.pop(version)
            return {"weights": to_numpy(self.flat.weights).copy(), "moments": moments, "carried": carried,
                    "clock": clock}  # fmt: skip
        found = self._row(version)
        if found is None:
            return None
        slot, clock = found
        moments = {name: self.host.segment.array(f"kept-{slot}-{name}").copy() for name in self.moment_names}
        if self._row(version, taken=True) is None:  # overwritten meanwhile: the others do not wait for copies
            return None
        return {"weights": to_numpy(self.flat.weights).copy(), "moments": moments, "carried": carried, "clock": clock}

    def kept(self, version: int, carried: dict[str, Array]) -> dict[str, Any] | None:
        """The shared half at the version that this worker reads; its vectors stay in the segment."""
        if not self.keeps:
            return None
        if not is_finite(self.flat.weights):
            raise FloatingPointError(f"the weights are not finite at step {version}")
        found = self._row(version)
        return {"carried": carried, "clock": found[1]} if found is not None else None

    def _row(self, version: int, taken: bool = False) -> tuple[int, dict[str, Any]] | None:
        """The slot with the state of a version, and the clock's state then; `taken`: it may be overwritten now."""
        with self._locked("its turn to look for a state"):
            for slot, row in enumerate(self.book.captures):
                if row is not None and row[0] == version:
                    row[3] = -1 if taken else row[3]
                    return slot, {**row[1], "updates": row[2]}
        return None

    def _capture(self, entry: Entry) -> None:
        """Keep the state after an entry: for oneself, or in place of the oldest that nobody has yet to take."""
        segment, owner = self.host.segment, -1
        if entry.lasting:
            owner = next(rank for (rank, _), reply in entry.replies.items() if reply.duties)
        if owner == self.rank:  # nobody else has to wait for it, or can overwrite it
            moments = {name: segment.array(f"moment-{name}").copy() for name in self.moment_names}
            self.taken = {entry.version + 1: (moments, {**(entry.clock or {}), "updates": self.book.updates})}
            return
        ages = {slot: row[0] if row else -1 for slot, row in enumerate(self.book.captures)
                if not row or row[3] < 0 or owner >= 0}  # fmt: skip
        if not ages:
            return
        slot = min(ages, key=lambda one: ages[one])
        versions = segment.array("kept-versions")
        versions[slot] = -1
        for name in self.moment_names:
            segment.tensor(f"kept-{slot}-{name}").copy_(segment.tensor(f"moment-{name}"))
        if self.keeps:
            segment.tensor(f"kept-{slot}-weights").copy_(self.buffers[self.book.newest])
        versions[slot] = entry.version + 1
        self.book.captures[slot] = [entry.version + 1, entry.clock, self.book.updates, owner]

    # -------------------------------------------------------------------------------------------------------- the lock
    @contextmanager
    def _locked(self, awaited: str) -> Iterator[None]:
        """The bookkeeping is this worker's inside, and written down afterwards.

        Raises:
            PeerLost: somebody died while he wrote, the group has broken up, or the limit is over.
        """
        self._lock(awaited)
        try:
            if self.words.get(WRITING):
                self.host.abort()
                raise PeerLost(f"rank {self.rank} waited for {awaited}: a worker died in the midst of an update")
            self.words.put(WRITING, 1)
            self._read()
            for rank in self._dead():
                self._forget(rank)
            yield
            self._write()
            self.words.put(WRITING, 0)
        finally:
            fcntl.flock(self.host.segment.descriptor, fcntl.LOCK_UN)
            self.words.set(RELEASED, time.monotonic_ns())

    def _lock(self, awaited: str) -> None:
        deadline = time.monotonic() + self.host.timeout_s
        while True:
            self.host.check(awaited)
            released = self.words.get(RELEASED)
            try:
                fcntl.flock(self.host.segment.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                self.words.sleep(RELEASED, released, POLL_S)
            if time.monotonic() > deadline:
                raise PeerLost(f"rank {self.rank} waited {self.host.timeout_s:g} s for the lock ({awaited})")

    def _dead(self) -> list[int]:
        """Ranks that have died since anybody looked; who took a place again is watched anew."""
        dead = []
        for index, rank in enumerate(self.host.ranks):
            if rank == self.rank:
                continue
            pid = int(self.pids[index])
            if pid == 0:  # another worker has seen to it
                self.host.unwatch(rank)
            elif not self.host.watch(rank, pid):
                dead.append(rank)
        dead += self.host.dead()
        for rank in dead:
            self.host.unwatch(rank)
            self.pids[self.host.ranks.index(rank)] = 0
        return dead

    def _forget(self, rank: int) -> None:
        """A worker is gone: the clock lets it go, its buffer is free."""
        self.book.readers.pop(rank, None)
        self.book.answers = [row for row in self.book.answers if row[0] != rank]
        for row in self.book.captures:
            if row is not None and row[3] == rank:
                row[3] = -1
        self._commit(self.clock.leave(rank))

    def _read(self) -> None:
        place = self.words.get(PLACE)
        if place == self.read_place:
            return
        length = int(self.books[place % 2, :8].view(np.int64)[0])
        book, clock = marshal.loads(self.books[place % 2, 8 : 8 + length].tobytes())
        newest, readers, answers, updates, captures = book
        replies = [(rank, ticket, load_reply(reply), buffer) for rank, ticket, reply, buffer in answers]
        self.book = Book(newest, readers, replies, updates, captures)
        clock["carried"] = {"heads": [], "ranks": [
            [rank, self.carried_rows[self.host.ranks.index(rank)].copy() if has else None, unlist(integers), weight]
            for rank, has, integers, weight in clock["carried"]]}  # fmt: skip
        self.clock.restore(clock)
        self.read_place = place

    def _write(self) -> None:
        book, clock = self.book, self.clock.dump()
        rows = clock["carried"]["ranks"]
        for rank, vector, _, _ in rows:
            if vector is not None:
                self.carried_rows[self.host.ranks.index(rank)] = vector
        clock["carried"] = [[rank, vector is not None, listed(integers), weight]
                            for rank, vector, integers, weight in rows]  # fmt: skip
        answers = [(rank, ticket, dump_reply(reply), buffer) for rank, ticket, reply, buffer in book.answers]
        text = marshal.dumps(((book.newest, book.readers, answers, book.updates, book.captures), clock))
        if len(text) > BOOK_BYTES - 8:
            raise RuntimeError(f"the servers' bookkeeping has grown to {len(text)} bytes, {BOOK_BYTES} are there")
        place = (self.words.get(PLACE) + 1) & 0xFFFFFFFF
        self.books[place % 2, 8 : 8 + len(text)] = np.frombuffer(text, np.uint8)
        self.books[place % 2, :8].view(np.int64)[0] = len(text)
        self.words.put(FINISHED, self.clock.finished is not None)
        self.words.put(PLACE, place)
        self.read_place = place

    # -------------------------------------------------------------------------------------------------------- exchange
    def exchange(self, head: Head, gradient: Tensor, weights: Tensor) -> Reply:
        """Have one phase's gradient applied, and read the new version from now on."""
        head.ticket += self.generation * 10**9
        with self._locked(f"the turn of its gradient {head.ticket}"):
            self.host.at("lock")
            self.book.readers.pop(self.rank, None)
            self._commit(self.clock.arrive(0, self.rank, head.ticket, head))
            answer, events = self._take(head.ticket), self.words.get(EVENTS)
        deadline = time.monotonic() + self.host.timeout_s
        while answer is None:
            awaited = f"workers still computing: {sorted(self.clock.computing)}"
            self.words.sleep(EVENTS, events, POLL_S)
            with self._locked(awaited):
                answer, events = self._take(head.ticket), self.words.get(EVENTS)
            if time.monotonic() > deadline:
                raise PeerLost(f"rank {self.rank} waited {self.host.timeout_s:g} s for {awaited}")
        self.host.at("answer")
        self.bytes_sent += gradient.numel() * gradient.element_size()
        reply, buffer = answer
        self.flat.point_to(self.buffers[buffer])
        return reply

    def join(self, head: Head, weights: Tensor) -> Reply:
        """Read the newest version."""
        return self.exchange(head, weights[:0], weights)

    def leave(self) -> None:
        """Take no part."""
        with self._locked("its turn to leave"):
            self._forget(self.rank)

    def judge(self, version: int, metrics: dict[str, float]) -> str | None:
        """Report an evaluation."""
        with self._locked("its turn to report an evaluation"):
            verdict, entries = self.clock.judge(self.rank, version, metrics)
            self._commit(entries)
        return verdict

    def is_finished(self) -> bool:
        """Whether the run is over by what was published last; asked from another thread, which takes no part."""
        return bool(self.words.get(FINISHED))

    def all_gather(self, payload: bytes) -> list[bytes]:
        """Every worker's payload, in rank order."""
        return self.host.exchange(payload)

    def _take(self, ticket: int) -> tuple[Reply, int] | None:
        for row in self.book.answers:
            rank, own, reply, buffer = row
            if (rank, own) == (self.rank, ticket):
                self.book.answers.remove(row)
                return reply, buffer
        return None

    def _commit(self, entries: list[Entry]) -> None:
        """Apply entries in their order, and lay out the answers."""
        for entry in entries:
            norm = None if entry.dropped else self._apply(entry)
            for rank, ticket in entry.members:
                reply = entry.replies[rank, ticket]
                reply.grad_norm = norm
                self.book.answers.append((rank, ticket, reply, self.book.newest))
                self.book.readers[rank] = self.book.newest
        if any(rank != self.rank for entry in entries for rank, _ in entry.members):
            self.words.set(EVENTS, self.words.get(EVENTS) + 1)

    def _apply(self, entry: Entry) -> float | None:
        """Write the next version into a buffer that nobody reads; the mean gradient's norm, if it is needed."""
        used = {self.book.newest, *self.book.readers.values()}
        target = next(index for index in range(len(self.buffers)) if index not in used)
        start, stop = self.flat.layout.phase_range(entry.phase)
        messages = {rank: self.everyones[self.host.ranks.index(rank)][start + TAIL * entry.phase :][: stop - start]
                    for rank, _ in entry.members}  # fmt: skip
        squares: list[float] = []
        captures, entry.capture = entry.capture, False  # by the shards
        for shard in self.shards:
            part = slice(*shard.range)
            shard.weights = self.buffers[target][part]
            shard.weights.copy_(self.buffers[self.book.newest][part])
            shard.optimizer.updates = self.book.updates
            own = shard.phase_slice(entry.phase)
            for rank, ticket in entry.members:
                shard.hold(rank, ticket, messages[rank][own])
            squares += shard.reduce(entry)
            shard.apply(entry, None)
            for message in messages.values():
                message[own].zero_()
            self.host.at("update")
        self.book.newest = target
        self.book.updates += entry.last_phase
        if captures:
            self._capture(entry)
        self.host.at("publish")
        return math.sqrt(sum(squares)) if entry.needs_norm else None


def dump_reply(reply: Reply) -> dict[str, Any]:
    """Plain values and bytes."""
    news = reply.news
    values = {**vars(reply), "integers": listed(reply.integers), "news": None}
    if reply.carried is not None:
        values["carried"] = reply.carried.tobytes()
    if news is not None:
        base = None if news.base is None else news.base.tobytes()
        values["news"] = news.place, base, [(before.tobytes(), sums.tobytes()) for before, sums in news.parts]
    return values


def load_reply(values: dict[str, Any]) -> Reply:
    """The inverse of `dump_reply`."""
    reply = Reply(**{**values, "integers": unlist(values["integers"]), "news": None})
    if values["carried"] is not None:
        reply.carried = np.frombuffer(values["carried"])
    if values["news"] is not None:
        place, base, parts = values["news"]
        parts = [(np.frombuffer(before), np.frombuffer(sums)) for before, sums in parts]
        reply.news = News(place, None if base is None else np.frombuffer(base), parts)
    return reply


def listed(arrays: Mapping[str, Array]) -> dict[str, Any]:
    """Integer arrays as plain values."""
    return {name: [str(array.dtype), array.tolist()] for name, array in arrays.items()}


def unlist(values: Mapping[str, Any]) -> dict[str, Array]:
    """The inverse of `listed`."""
    return {name: np.asarray(value, dtype) for name, (dtype, value) in values.items()}


def is_intact(segment_descriptor: int, words: Words, seconds: float) -> bool:
    """Whether the bookkeeping is whole, seen by somebody who takes no part; waits for the lock so long."""
    own = os.open(f"/proc/self/fd/{segment_descriptor}", os.O_RDWR | os.O_CLOEXEC)
    deadline = time.monotonic() + seconds
    try:
        while time.monotonic() < deadline:
            try:
                fcntl.flock(own, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                time.sleep(POLL_S / 10)
                continue
            return not words.get(WRITING)
        return False
    finally:
        os.close(own)
