"""`strategy: parameter_server`: servers hold weights and optimiser in shards; workers push gradients, pull weights.

Dataflow of one exchange. A worker pushes each server its slice of the gradient. Each server holds the slice and tells
the *clock* (on server 0) that it arrived. When all slices of a gradient have arrived, the clock orders it into an
`Entry`; every shard applies entries in that order and answers the workers named in the entry with its slice of the
new weights. So all slices that a worker pulls are of one version, and version, staleness and a checkpoint's cut are
one number.

    worker: push slices ── wait ──────────────────────────────────────────────▶ slices of one version
    server: hold ▶ clock.arrive ▶ (all slices?) ▶ (bound kept?) ▶ entry ▶ reduce ▶ clip ▶ apply ▶ answer

Who unblocks whom: a held gradient is released by another worker's arrival, or by that worker leaving (death,
evaluation, end of the run). One rule makes all three modes: a gradient is applied at once if no worker still computing
started before version v + 1 - s, else held; when it may be applied, all held ones are averaged with it by count
(bounded staleness after Ho et al. 2013, stated in versions). s = 0 is sync, infinity is async.

`prefetch` keeps one answer under way while the next gradient is computed: push k, take answer k - 1, compute k + 1 on
its weights. A worker then waits only if answer k - 1 is not there when gradient k is done; the clock counts it as
computing, from the version of answer k - 1, from the moment that gradient k has arrived. Both of its gradients may be
held at once, and then go into one entry: with a bound too small to go on, all workers block, and so all are released.

`staleness_scaling` divides a gradient's step by max(1, staleness) (Zhang et al. 2016): see `Clock._scale`.

With `compression` a worker pushes payloads, each server decodes its own, and what was not pushed is a part of the
worker's own half. Weights are pulled as they are. Under async and ssp the own halves in a checkpoint are each worker's
newest, not of one version.

Shapes: S elements of a shard, N of all.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor

from distml.exchange.channel import PULL, Channel, Gradient, Group, Head, News, Reply, Wire
from distml.exchange.compression.build import build_compressor
from distml.exchange.flat import TAIL, from_numpy, to_numpy
from distml.exchange.layout import Array, Layout
from distml.exchange.segment import Regions
from distml.spec.schema import JobSpec, OptimizerSpec, ParameterServerSpec
from distml.strategies.agenda import SNAPSHOT_AFTER_S, Agenda, Spent, crossed
from distml.strategies.base import Strategy
from distml.strategies.optimizer import FlatOptimizer, block_square_norms, clip_scale, written_optimizer
from distml.strategies.replica import Replica
from distml.strategies.shard import Entry, shard_range
from distml.strategies.tally import Tally


class Clock:
    """Server 0's order of updates. Knows who is computing, and from which version; pure bookkeeping, no tensors.

    Args:
        job: the spec; its strategy is a parameter server.
        agenda: budgets, evaluations, duties.
        num_phases: exchanges per step.
    """

    def __init__(self, job: JobSpec, agenda: Agenda, num_phases: int) -> None:
        assert isinstance(job.strategy, ParameterServerSpec)
        self.job, self.agenda, self.num_phases = job, agenda, num_phases
        self.is_sync, self.num_servers = job.strategy.is_synchronous, job.strategy.servers
        self.bound = {"sync": 0, "async": math.inf, "ssp": job.strategy.max_staleness or 0}[job.strategy.mode]
        self.prefetch, self.scales = job.strategy.prefetch, job.strategy.staleness_scaling
        self.version = self.examples = self.frames = self.number = 0
        self.finished: str | None = None
        self.computing: dict[int, int] = {}  # rank -> version that its next gradient is of
        self.awaited: dict[int, int] = {}  # rank -> ticket without whose answer it does not go on
        self.newest: dict[int, int] = {}  # rank -> version of the newest weights that were sent to it
        self.away: set[int] = set()  # who evaluates, and then pulls anew
        self.joined: dict[int, int] = {}  # rank -> ticket it joined with; gradients of others are of the dead
        self.last_tickets: dict[int, int] = {}  # rank -> of its gradients, the last in their own order
        self.contributed: dict[int, float] = {}  # rank -> examples of its applied gradients
        self.held: list[Head] = []
        self.arrived: dict[tuple[int, int], set[int]] = {}
        self.heads: dict[tuple[int, int], Head] = {}
        self.evaluators: set[int] = set()
        self.evaluation_waits = False
        self.snapshot_at = -math.inf  # on the host's monotonic clock
        self.carried: dict[int, tuple[Array | None, dict[str, Array], float]] = {}
        self.tally = Tally()

    # ------------------------------------------------------------------------------------------------------ membership
    def begin(self, ranks: list[int]) -> None:
        """These workers compute from the current version; before their first gradient nobody is applied alone."""
        self.computing = dict.fromkeys(ranks, self.version)
        self.newest = dict.fromkeys(ranks, self.version)
        self.joined = dict.fromkeys(ranks, -1)
        self.awaited, self.away, self.last_tickets = {}, set(), {}
        self.held, self.arrived, self.heads = [], {}, {}
        self.evaluators, self.evaluation_waits = set(), False
        self.contributed = {rank: self.contributed.get(rank, 0.0) for rank in ranks}
        self.tally = Tally()

    def _join(self, head: Head) -> Entry:
        """A worker pulls the current version and computes from it; what it pushed before, it has given up."""
        rank = head.rank
        self._forget(rank, before=head.ticket)
        self.joined[rank] = self.last_tickets[rank] = head.ticket
        self.newest[rank] = self.version
        if self.finished is None:
            self.computing[rank] = self.version
        return self._answer([head])

    def leave(self, rank: int) -> list[Entry]:
        """A worker no longer computes: its unfinished gradients are dropped, and nobody waits for it."""
        self.computing.pop(rank, None)
        self.joined.pop(rank, None)
        if rank in self.evaluators:
            self.evaluation_waits = True
        self._forget(rank)
        return self._release()

    def _forget(self, rank: int, before: float = math.inf) -> None:
        """Drop what a worker has under way, up to a ticket."""
        self.evaluators.discard(rank)
        self.away.discard(rank)
        self.awaited.pop(rank, None)
        self.last_tickets.pop(rank, None)
        self.held = [head for head in self.held if head.rank != rank]
        for key in [key for key in self.heads | self.arrived if key[0] == rank and key[1] < before]:
            self.heads.pop(key, None)
            self.arrived.pop(key, None)

    # ---------------------------------------------------------------------------------------------------------- order
    def arrive(self, server: int, rank: int, ticket: int, head: Head | None = None) -> list[Entry]:
        """A slice has arrived at `server` (server 0 passes the head): the entries that may now be applied."""
        if ticket < self.joined.get(rank, ticket):
            return []  # of one who died, and in whose place another has joined since
        key = (rank, ticket)
        self.arrived.setdefault(key, set()).add(server)
        if head is not None:
            self.heads[key] = head
        entries: list[Entry] = []
        while (complete := self._next_complete(rank)) is not None:
            entries += self._accept(complete)
        return entries

    def _next_complete(self, rank: int) -> Head | None:
        """The next of this worker's gradients of which all slices are there.

        A worker that prefetches has two under way, whose slices may arrive out of turn; they are taken in turn.
        """
        for key in sorted(key for key in self.heads if key[0] == rank):
            head = self.heads[key]
            last = self.last_tickets.get(rank)
            early = self.prefetch and head.phase != PULL and last is not None and head.ticket > last + 1
            if not early and len(self.arrived[key]) == self.num_servers:
                del self.heads[key], self.arrived[key]
                return head
        return None

    def _accept(self, head: Head) -> list[Entry]:
        """A whole gradient, or a wish to join, is there."""
        rank = head.rank
        if head.phase == PULL:
            self.tally.add(head)
            return [self._join(head)]
        if rank not in self.joined:
            return []  # under way when its worker left: nobody awaits the answer
        self.last_tickets[rank] = head.ticket
        if head.carried is not None or head.integers:
            weight = self.carried[rank][2] if rank in self.carried else 0.0
            self.carried[rank] = (head.carried, head.integers, weight + head.count)
            head.carried, head.integers = None, {}
        self.tally.add(head)
        head.base = head.sums = None
        self._goes_on(head)
        self.held.append(head)
        return self._release()

    def _goes_on(self, head: Head) -> None:
        """What a worker does once it has pushed: wait for the answer; or, prefetching, only for the one before it."""
        rank = head.rank
        self.computing.pop(rank, None)
        earlier = [other.ticket for other in self.held if other.rank == rank]
        if not self.prefetch or head.phase != self.num_phases - 1:
            self.awaited[rank] = head.ticket
        elif earlier:
            self.awaited[rank] = earlier[0]
        elif rank not in self.away and self.finished is None:
            self.computing[rank] = self.newest[rank]

    def judge(self, rank: int, version: int, metrics: dict[str, float]) -> tuple[str | None, list[Entry]]:
        """An evaluation's verdict; if the run is over by it, whoever waits is released."""
        self.evaluators.discard(rank)
        verdict = self.agenda.judge(version, metrics)
        if verdict is not None and self.finished is None:
            self.finished = verdict
            return verdict, self._release()
        return verdict or self.finished, []

    def _release(self) -> list[Entry]:
        entries = []
        while self.held:
            if self.finished is not None:
                heads, self.held = self.held, []
                entries.append(self._answer(heads))
                break
            if any(start < self.version + 1 - self.bound for start in self.computing.values()):
                break
            # The first phase first: whoever is in the midst of a step still computes from the step's version.
            phase = min(head.phase for head in self.held)
            heads = sorted((h for h in self.held if h.phase == phase), key=lambda head: (head.rank, head.ticket))
            self.held = [head for head in self.held if head.phase != phase]
            entries.append(self._order(phase, heads))
        return entries

    def _answer(self, heads: list[Head]) -> Entry:
        """An entry that changes nothing: its members get the weights as they are."""
        entry = self._entry(heads[0].phase, heads)
        entry.dropped = True
        for head in heads:
            self.awaited.pop(head.rank, None)
            news = self.tally.news(None if head.phase == PULL else head.place)
            reply = Reply(self.version, self.examples, self.frames, finished=self.finished, news=news)
            entry.replies[head.rank, head.ticket] = reply
        return entry

    def _entry(self, phase: int, heads: list[Head]) -> Entry:
        self.number += 1
        members = [(head.rank, head.ticket) for head in heads]
        count, rows = sum(head.count for head in heads), sum(head.rows for head in heads)
        frames, last = sum(head.frames for head in heads), phase == self.num_phases - 1
        return Entry(self.number, phase, members, count, rows, frames, self.version, last)

    @property
    def spent(self) -> Spent:
        """What the run has used up at this version; whether its time is over, workers vote on."""
        return Spent(self.version, self.examples, self.frames)

    def _order(self, phase: int, heads: list[Head]) -> Entry:
        entry = self._entry(phase, heads)
        if self.scales:
            self._scale(entry, heads)
        duties: tuple[str, ...] = ()
        if entry.last_phase:
            self.version += 1
            self.examples += round(entry.rows)
            self.frames += round(entry.frames)
            for head in heads:
                self.contributed[head.rank] = self.contributed.get(head.rank, 0.0) + head.rows
            votes = sum(head.vote for head in heads)
            self.finished = self.agenda.spent(self.spent) or Strategy.verdict(votes)
            duties = self._duties()
        clips = self.is_sync and self.job.optimizer.clip_norm is not None
        reports = entry.last_phase and crossed(entry.version, entry.version + 1, self.job.log.every)
        entry.needs_norm, entry.capture = clips or reports, self.agenda.captures(duties)
        entry.clock = self.state() if entry.capture else None
        entry.lasting = "evaluate" in duties or "checkpoint" in duties
        for position, head in enumerate(heads):
            self._reply(entry, head, duties if self.is_sync or position == 0 else ())
        return entry

    def _reply(self, entry: Entry, head: Head, duties: tuple[str, ...]) -> None:
        """Answer one gradient of an entry, and note what its worker does with the answer."""
        rank = head.rank
        reply = Reply(self.version, self.examples, self.frames, entry.version - head.read_version, applied=True,
                      contributed=self.contributed.get(rank, 0.0), finished=self.finished, duties=duties)  # fmt: skip
        if duties and not self.is_sync:
            reply.carried, reply.integers = self._average_carried()
        entry.replies[rank, head.ticket] = reply
        if entry.last_phase:
            reply.news = self.tally.news(head.place)
            self.newest[rank] = self.version
        if "evaluate" in duties and not self.is_sync:
            self.evaluators.add(rank)
            self.away.add(rank)  # it pulls anew afterwards; until then nobody waits for it
        if self.awaited.get(rank) == head.ticket:
            del self.awaited[rank]
            if self.finished is None and not (entry.last_phase and rank in self.away):
                self.computing[rank] = self.version if entry.last_phase else head.read_version

    @staticmethod
    def _scale(entry: Entry, heads: list[Head]) -> None:
        """Divide each gradient's step by max(1, staleness) (Zhang et al. 2016, equation 6).

        With gradients g_i that are sums over c_i, and f_i = 1 / max(1, staleness_i), the update is made from the mean
        gradient sum f_i g_i / sum f_i c_i at the learning rate times f = sum f_i c_i / sum c_i. For SGD that is
        lr * sum f_i g_i / sum c_i: each contribution is divided by its own staleness. An adaptive rule would undo a
        factor on the gradient; it is the learning rate's factor that makes its step smaller too.
        """
        factors = [1.0 / max(1, entry.version - head.read_version) for head in heads]
        counts = sum(head.count for head in heads)
        scaled = sum(factor * head.count for factor, head in zip(factors, heads, strict=True))
        if len(set(factors)) == 1:
            entry.lr_factor = factors[0]
        elif counts:
            entry.lr_factor, entry.count, entry.factors = scaled / counts, scaled, factors

    def _duties(self) -> tuple[str, ...]:
        duties = self.agenda.duties(self.version, self.finished)
        if self.is_sync:
            return duties
        duties = self._without_hurried_snapshot(duties)
        if self.evaluation_waits and "evaluate" not in duties and self.finished is None:
            duties = ("evaluate", *duties)
        if "evaluate" in duties and self.evaluators and self.finished is None:
            self.evaluation_waits = True  # one evaluation at a time: this one follows when the other is done
            return tuple(duty for duty in duties if duty != "evaluate")
        self.evaluation_waits = self.evaluation_waits and "evaluate" not in duties
        return duties

    def _without_hurried_snapshot(self, duties: tuple[str, ...]) -> tuple[str, ...]:
        """A snapshot costs as much as some updates of a small model: one that only recovery needs may be left out."""
        if "snapshot" not in duties:
            return duties
        now = time.monotonic()
        if "checkpoint" not in duties and now < self.snapshot_at + SNAPSHOT_AFTER_S:
            return tuple(duty for duty in duties if duty != "snapshot")
        self.snapshot_at = now
        return duties

    def _average_carried(self) -> tuple[Array | None, dict[str, Array]]:
        """Floating buffers averaged by the examples since the last average; integer ones of the lowest rank."""
        rows = [(vector, weight) for vector, _, weight in self.carried.values() if vector is not None]
        total = sum(weight for _, weight in rows)
        average: Array | None = sum(vector * (weight / total) for vector, weight in rows) if total else None  # type: ignore[assignment]
        integers = self.carried[min(self.carried)][1] if self.carried else {}
        self.carried = {rank: (vector, ints, 0.0) for rank, (vector, ints, _) in self.carried.items()}
        return average, integers

    # ---------------------------------------------------------------------------------------------------------- state
    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps: JSON values."""
        contributed = [[rank, rows] for rank, rows in sorted(self.contributed.items())]
        return {"version": self.version, "examples": self.examples, "frames": self.frames,
                "agenda": self.agenda.state(), "contributed": contributed}  # fmt: skip

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Continue from `state`."""
        spent = Spent.of(state)
        self.version, self.examples, self.frames = spent.version, spent.examples, spent.frames
        self.agenda.load_state(state["agenda"])
        self.finished = self.agenda.over(spent)
        self.number, self.carried = 0, {}
        # Of a checkpoint that another strategy wrote, nobody knows whose gradients it came from.
        self.contributed = dict(state["contributed"]) if "contributed" in state else {}

    def dump(self) -> dict[str, Any]:
        """Everything that the clock knows, for another one to go on in the midst of an exchange.

        What marshal takes, but for the buffers' arrays, which stand under "carried" alone. The clock goes on with the
        same containers: to be written down at once.
        """
        return {
            **{name: getattr(self, name) for name in (*PLAIN, *BY_RANK)},
            "agenda": self.agenda.state(),
            "held": [dump_head(head) for head in self.held],
            "heads": [dump_head(head) for head in self.heads.values()],
            "carried": {
                "ranks": [[rank, *row] for rank, row in self.carried.items()],
                "heads": [[head.carried, head.integers, head.base, head.sums] for head in self.heads.values()],
            },
            "tally": self.tally.dump(),
        }  # fmt: skip

    def restore(self, dump: Mapping[str, Any]) -> None:
        """The inverse of `dump`."""
        for name in (*PLAIN, *BY_RANK):
            setattr(self, name, dump[name])
        self.agenda.load_state(dump["agenda"])
        self.held = [Head(*row) for row in dump["held"]]
        heads = [Head(*row) for row in dump["heads"]]
        for head, arrays in zip(heads, dump["carried"]["heads"], strict=True):
            head.carried, head.integers, head.base, head.sums = arrays
        self.tally.restore(dump["tally"])
        self.heads = {(head.rank, head.ticket): head for head in heads}
        self.carried = {rank: (vector, integers, weight) for rank, vector, integers, weight in dump["carried"]["ranks"]}


PLAIN = ("version", "examples", "frames", "number", "finished", "arrived", "evaluators", "away", "evaluation_waits",
         "snapshot_at")  # fmt: skip
BY_RANK = ("computing", "awaited", "newest", "joined", "last_tickets", "contributed")  # a clock's mappings of ranks


def dump_head(head: Head) -> list[Any]:
    """A head's arguments without its arrays."""
    return [head.rank, head.ticket, head.phase, head.read_version, head.count, head.vote, None, {}, head.rows,
            head.frames, head.place]  # fmt: skip


def spent_by(reply: Reply) -> Spent:
    """What the run has used up, as an answer says."""
    return Spent(reply.version, reply.examples, reply.frames)


class ServerGroup:
    """The workers as a group whose collectives go through server 0 (synchronous mode)."""

    def __init__(self, channel: Channel, rank: int, size: int) -> None:
        self.channel, self.rank, self.size, self.bytes_sent = channel, rank, size, 0

    def all_gather(self, payload: bytes) -> list[bytes]:
        """Every worker's payload, in rank order."""
        return self.channel.all_gather(payload)

    def all_reduce(self, vector: Tensor) -> None:
        """Sum in rank order."""
        own = to_numpy(vector)
        parts = self.all_gather(own.tobytes())
        import numpy as np

        total = torch.zeros(own.shape, dtype=vector.dtype)  # on the CPU, wherever the vector lives
        for part in parts:
            total += from_numpy(np.frombuffer(bytearray(part), own.dtype).reshape(own.shape))
        vector.copy_(total)


def answered_range(layout: Layout, entry: Entry, is_sync: bool) -> tuple[int, int]:
    """Elements [start, stop) that the members of an entry are sent.

    Under sync nobody else has changed the other phases' weights. Under async and ssp a step's gradients are of one
    version, pulled whole with its last phase; in between a worker is sent only what its own gradient has changed.
    """
    if entry.dropped or (entry.last_phase and not is_sync):
        return 0, layout.numel
    return layout.phase_range(entry.phase)


class ParameterServer(Replica):
    """The worker's half: pushes each phase's summed gradient with its count, pulls one version of the weights."""

    def _build(self) -> None:
        assert isinstance(self.job.strategy, ParameterServerSpec)
        self.ticket = 0
        self.place = 0  # of the accumulators' base: see tally.py
        self.read_version = 0  # that the step's gradients are of; what a phase's answer brings may be newer
        self.is_sync, self.prefetch = self.job.strategy.is_synchronous, self.job.strategy.prefetch
        self.under_way: Any = None  # prefetch: the gradient whose answer is not taken yet
        self.has_new_weights = False
        self._group: Group | None = None
        self.num_servers = self.job.strategy.servers
        self.compressor = build_compressor(self.job, self.flat.layout, self.flat.weights)

    def connect(self, group: Group | None, channel: Channel | None) -> None:
        assert channel is not None
        self.channel, self.leaves_gradients = channel, not channel.clears_gradients
        self.place = 0
        self.under_way = None
        self._group = ServerGroup(channel, self.rank, self.world_size)

    def load_shared(self, shared: Mapping[str, Any]) -> None:
        super().load_shared(shared)
        self.channel.load(shared)
        self.under_way = None

    def shared_state(self) -> dict[str, Any] | None:
        return self.channel.captured(self.progress.version, self.carried.arrays())

    def kept_state(self) -> dict[str, Any] | None:
        return self.channel.kept(self.progress.version, self.carried.arrays())

    def too_large_to_share(self) -> str | None:
        from distml.strategies.shared_servers import BOOK_BYTES, ELEMENT_BYTES

        elements = sum(tensor.numel() for tensor in self.carried.tensors.values())
        counted = sum(tensor.numel() for tensor in (*self.carried.bases, *self.carried.sums))
        rows = self.world_size + 2  # of buffers; everyone's answer may bring as many sums
        fits = rows * (ELEMENT_BYTES * elements + 8 * rows * counted) <= BOOK_BYTES // 2
        return None if fits else f"{elements:,} elements of buffers are too many for asynchronous workers to share"

    def regions(self, size: int, keeps: bool) -> Regions:
        from distml.strategies.shared_servers import async_regions

        moments = FlatOptimizer(self.job.optimizer, self.flat.layout, (0, 0), self.flat.weights, None).moments
        return async_regions(self.flat, self.carried, list(moments), size, keeps)

    @property
    def group(self) -> Group:
        from distml.strategies.single import Alone

        return self._group if self.is_sync and self._group is not None else Alone()

    def rejoin(self) -> None:
        """Pull the newest version and take part; but first do what the answer under way, if there is one, asks for."""
        if self.under_way is not None:
            self._take_under_way()
            if self.duties or self.finished is not None:
                return
        head = Head(self.rank, self.ticket, PULL, self.progress.version, 0.0)
        if self.carried.counting:
            head.place, head.base = self.place, to_numpy(self.carried.base_vector())
        self.ticket += 1
        reply = self.channel.join(head, self.flat.weights)
        self.read_version = reply.version
        self._fold(reply.news)
        self._advance(spent_by(reply), reply.finished, ())

    def leave(self) -> None:
        self.under_way = None  # of a gradient that came after the end
        self.channel.leave()

    def step(self) -> None:
        if self.has_new_weights:
            super().step()
        else:
            self.meter.steps += 1  # the first gradient of those that are prefetched has no answer yet

    def _update(self, phase: int, count: float, last: bool) -> None:
        gradient = self.flat.phase_message(phase)[:-TAIL]
        if not self.is_sync and self.job.optimizer.clip_norm is not None:
            whole = (0, self.flat.layout.numel)
            norm = math.sqrt(sum(block_square_norms(self.flat.layout, gradient, whole, phase))) / max(count, 1.0)
            gradient.mul_(clip_scale(norm, self.job.optimizer.clip_norm))
        head = Head(self.rank, self.ticket, phase, self.read_version, count, self.vote, rows=self._rows,
                    frames=self._frames)  # fmt: skip
        if not self.is_sync and last and self.carried.tensors:
            self._bring_buffers(head)
        self.ticket += 1
        before = self.channel.bytes_sent
        if last and self.prefetch:
            self._push_ahead(head, self._outgoing(phase, gradient))
        else:
            self._consume(self.channel.exchange(head, self._outgoing(phase, gradient), self.flat.weights), last)
        self.meter.bytes_sent += self.channel.bytes_sent - before

    def _bring_buffers(self, head: Head) -> None:
        """Put what others are to know of the buffers into a head; what was counted is handed over."""
        head.carried, head.integers = to_numpy(self.carried.average_vector()), self.carried.integers()
        if self.carried.counting:
            head.place, head.base = self.place, to_numpy(self.carried.base_vector())
            head.sums = to_numpy(self.carried.take_sums())

    def _fold(self, news: News | None) -> None:
        """Let the accumulators take in what others have counted; an answer may bring again what an earlier one has."""
        if news is None:
            return
        known = self.place - news.place if news.base is None else 0
        self.carried.fold(news.base, news.parts[known:])
        self.place = news.place + len(news.parts)

    def _outgoing(self, phase: int, gradient: Tensor) -> Gradient:
        """What is pushed: the gradient, or a payload for each server; what that leaves out is pushed later."""
        if self.compressor is None:
            return gradient
        layout, servers = self.flat.layout, self.num_servers
        ranges = [shard_range(layout, layout.shard(index, servers), phase) for index in range(servers)]
        return self.compressor.encode(phase, gradient, ranges)

    def _push_ahead(self, head: Head, gradient: Gradient) -> None:
        """Push this gradient, and go on with the answer to the one before."""
        pushed = cast(Wire, self.channel).push(head, gradient)
        self.has_new_weights, self.duties = self.under_way is not None, ()
        if self.under_way is not None:
            self._take_under_way()
        self.under_way = pushed

    def _take_under_way(self) -> None:
        handle, self.under_way = self.under_way, None
        self._consume(cast(Wire, self.channel).take(handle, self.flat.weights), last=True)

    def _consume(self, reply: Reply, last: bool) -> None:
        """Go on from an answer; its weights are in the replica."""
        self.has_new_weights = True
        if reply.grad_norm is not None:
            self.meter.grad_norm = reply.grad_norm
        if not last:
            return
        self.read_version = reply.version
        if reply.applied:
            self.meter.add_staleness(reply.staleness)
            self.meter.contributed = reply.contributed
        self._fold(reply.news)
        if reply.carried is not None:
            self.carried.set_average(from_numpy(reply.carried))
            self.carried.load(reply.integers)
        self._advance(spent_by(reply), reply.finished, reply.duties)

    def live_optimizer(self) -> OptimizerSpec:
        return written_optimizer(self.channel.live_optimizer(), self.job)

    def own_state(self) -> dict[str, Any]:
        return {} if self.compressor is None else self.compressor.state()

    def load_own(self, state: Mapping[str, Any]) -> None:
        if self.compressor is not None:
            self.compressor.load_state(state)

    def own_buffers(self) -> dict[str, Array]:
        """Under async and ssp none: whoever goes on from a state takes the shared ones, which have what all counted."""
        return super().own_buffers() if self.is_sync else {}

    def average_carried(self) -> None:
        if self.is_sync:
            super().average_carried()

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[tuple[int, int]]:
        """Under async and ssp the worker that made this version evaluates it alone; the others go on."""
        yield (self.rank, self.world_size) if self.is_sync else (0, 1)

    def judge(self, metrics: dict[str, float]) -> None:
        if self.is_sync:
            super().judge(metrics)
            if self.rank == 0:
                self.channel.judge(self.progress.version, metrics)
            return
        verdict = self.channel.judge(self.progress.version, metrics)
        if self.under_way is None or verdict in ("goal", "patience"):
            self.finished = verdict  # else the answer under way says so, and whether its version is the last one
