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

Shapes: S elements of a shard, N of all.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from distml.exchange.channel import PULL, Channel, Group, Head, Reply
from distml.exchange.flat import TAIL, from_numpy, to_numpy
from distml.exchange.layout import Array
from distml.spec.schema import JobSpec, ParameterServerSpec
from distml.strategies.agenda import Agenda, crossed
from distml.strategies.base import Strategy
from distml.strategies.optimizer import block_square_norms, clip_scale
from distml.strategies.shard import Entry


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
        self.version, self.examples, self.number = 0, 0, 0
        self.finished: str | None = None
        self.computing: dict[int, int] = {}
        self.joined: dict[int, int] = {}  # rank -> ticket it joined with; gradients of others are of the dead
        self.held: list[Head] = []
        self.arrived: dict[tuple[int, int], set[int]] = {}
        self.heads: dict[tuple[int, int], Head] = {}
        self.evaluators: set[int] = set()
        self.evaluation_waits = False
        self.carried: dict[int, tuple[Array | None, dict[str, Array], float]] = {}

    # ------------------------------------------------------------------------------------------------------ membership
    def begin(self, ranks: list[int]) -> None:
        """These workers compute from the current version; before their first gradient nobody is applied alone."""
        self.computing = dict.fromkeys(ranks, self.version)
        self.joined = dict.fromkeys(ranks, -1)
        self.held, self.arrived, self.heads = [], {}, {}
        self.evaluators, self.evaluation_waits = set(), False

    def _join(self, head: Head) -> Entry:
        """A worker pulls the current version and computes from it."""
        self.evaluators.discard(head.rank)
        self.joined[head.rank] = head.ticket
        if self.finished is None:
            self.computing[head.rank] = self.version
        return self._answer([head])

    def leave(self, rank: int) -> list[Entry]:
        """A worker no longer computes: its unfinished gradients are dropped, and nobody waits for it."""
        self.computing.pop(rank, None)
        self.joined.pop(rank, None)
        if rank in self.evaluators:
            self.evaluators.discard(rank)
            self.evaluation_waits = True
        self.held = [head for head in self.held if head.rank != rank]
        for key in [key for key in self.heads | self.arrived if key[0] == rank]:
            self.heads.pop(key, None)
            self.arrived.pop(key, None)
        return self._release()

    # ---------------------------------------------------------------------------------------------------------- order
    def arrive(self, server: int, rank: int, ticket: int, head: Head | None = None) -> list[Entry]:
        """A slice has arrived at `server` (server 0 passes the head): the entries that may now be applied."""
        key = (rank, ticket)
        self.arrived.setdefault(key, set()).add(server)
        if head is not None:
            self.heads[key] = head
        if len(self.arrived[key]) < self.num_servers or key not in self.heads:
            return []
        del self.arrived[key]
        head = self.heads.pop(key)
        if head.phase == PULL:
            return [self._join(head)]
        if ticket < self.joined.get(rank, math.inf):
            return []  # under way when its worker left: nobody awaits the answer
        self.computing.pop(rank, None)
        if head.carried is not None or head.integers:
            weight = self.carried[rank][2] if rank in self.carried else 0.0
            self.carried[rank] = (head.carried, head.integers, weight + head.count)
            head.carried, head.integers = None, {}
        self.held.append(head)
        return self._release()

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
            phase = self.held[0].phase
            heads = sorted((head for head in self.held if head.phase == phase), key=lambda head: head.rank)
            self.held = [head for head in self.held if head.phase != phase]
            entries.append(self._order(phase, heads))
        return entries

    def _answer(self, heads: list[Head]) -> Entry:
        """An entry that changes nothing: its members get the weights as they are."""
        entry = self._entry(heads[0].phase, heads)
        entry.dropped = True
        for head in heads:
            entry.replies[head.rank, head.ticket] = Reply(self.version, self.examples, finished=self.finished)
        return entry

    def _entry(self, phase: int, heads: list[Head]) -> Entry:
        self.number += 1
        members = [(head.rank, head.ticket) for head in heads]
        count, rows = sum(head.count for head in heads), sum(head.rows for head in heads)
        return Entry(self.number, phase, members, count, rows, self.version, phase == self.num_phases - 1)

    def _order(self, phase: int, heads: list[Head]) -> Entry:
        entry = self._entry(phase, heads)
        duties: tuple[str, ...] = ()
        if entry.last_phase:
            self.version += 1
            self.examples += round(entry.rows)
            self.finished = self.agenda.spent(self.version, self.examples) or Strategy.verdict(
                sum(h.vote for h in heads)
            )
            duties = self._duties()
        clips = self.is_sync and self.job.optimizer.clip_norm is not None
        reports = entry.last_phase and crossed(entry.version, entry.version + 1, self.job.log.every)
        entry.needs_norm, entry.capture = clips or reports, self.agenda.captures(duties)
        entry.clock = self.state() if entry.capture else None
        entry.lasting = "evaluate" in duties or "checkpoint" in duties
        for position, head in enumerate(heads):
            own = duties if self.is_sync or position == 0 else ()
            reply = Reply(self.version, self.examples, staleness=entry.version - head.read_version,
                          finished=self.finished, duties=own)  # fmt: skip
            if own and not self.is_sync:
                reply.carried, reply.integers = self._average_carried()
            entry.replies[head.rank, head.ticket] = reply
            if "evaluate" in own and not self.is_sync:
                self.evaluators.add(head.rank)  # it pulls anew afterwards; until then nobody waits for it
            elif self.finished is None:
                self.computing[head.rank] = self.version
        return entry

    def _duties(self) -> tuple[str, ...]:
        duties = self.agenda.duties(self.version, self.finished)
        if self.is_sync:
            return duties
        if self.evaluation_waits and "evaluate" not in duties and self.finished is None:
            duties = ("evaluate", *duties)
        if "evaluate" in duties and self.evaluators and self.finished is None:
            self.evaluation_waits = True  # one evaluation at a time: this one follows when the other is done
            return tuple(duty for duty in duties if duty != "evaluate")
        self.evaluation_waits = self.evaluation_waits and "evaluate" not in duties
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
        return {"version": self.version, "examples": self.examples, "agenda": self.agenda.state()}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Continue from `state`."""
        self.version, self.examples = state["version"], state["examples"]
        self.agenda.load_state(state["agenda"])
        self.finished = self.agenda.over(self.version, self.examples)
        self.number, self.carried = 0, {}

    def dump(self) -> dict[str, Any]:
        """Everything that the clock knows, for another one to go on in the midst of an exchange.

        JSON values, but for the buffers' arrays, which stand under "carried" alone.
        """
        return {
            "version": self.version, "examples": self.examples, "number": self.number, "finished": self.finished,
            "agenda": self.agenda.state(),
            "computing": list(map(list, self.computing.items())),
            "joined": list(map(list, self.joined.items())),
            "held": [dump_head(head) for head in self.held],
            "arrived": [[*key, sorted(servers)] for key, servers in self.arrived.items()],
            "heads": [dump_head(head) for head in self.heads.values()],
            "evaluators": sorted(self.evaluators), "evaluation_waits": self.evaluation_waits,
            "carried": {
                "ranks": [[rank, *row] for rank, row in self.carried.items()],
                "heads": [[head.carried, head.integers] for head in self.heads.values()],
            },
        }  # fmt: skip

    def restore(self, dump: Mapping[str, Any]) -> None:
        """The inverse of `dump`."""
        self.version, self.examples, self.number = dump["version"], dump["examples"], dump["number"]
        self.finished, self.evaluation_waits = dump["finished"], dump["evaluation_waits"]
        self.agenda.load_state(dump["agenda"])
        self.computing = dict(dump["computing"])
        self.joined = dict(dump["joined"])
        self.held = [Head(*row) for row in dump["held"]]
        self.arrived = {(rank, ticket): set(servers) for rank, ticket, servers in dump["arrived"]}
        heads = [Head(*row) for row in dump["heads"]]
        for head, (vector, integers) in zip(heads, dump["carried"]["heads"], strict=True):
            head.carried, head.integers = vector, integers
        self.heads = {(head.rank, head.ticket): head for head in heads}
        self.evaluators = set(dump["evaluators"])
        self.carried = {rank: (vector, integers, weight) for rank, vector, integers, weight in dump["carried"]["ranks"]}


def dump_head(head: Head) -> list[Any]:
    """A head's arguments without its arrays: JSON values."""
    return [head.rank, head.ticket, head.phase, head.read_version, head.count, head.vote, None, {}, head.rows]


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


class ParameterServer(Strategy):
    """The worker's half: pushes each phase's summed gradient with its count, pulls one version of the weights."""

    def _build(self) -> None:
        self.ticket = 0
        self.read_version = 0  # of the weights in the replica; between two phases they may be newer than the step's
        self.is_sync = self.job.strategy.is_synchronous
        self._group: Group | None = None

    def connect(self, group: Group | None, channel: Channel | None) -> None:
        assert channel is not None
        self.channel = channel
        self._group = ServerGroup(channel, self.rank, self.world_size)

    @property
    def group(self) -> Group:
        from distml.strategies.single import Alone

        return self._group if self.is_sync and self._group is not None else Alone()

    def rejoin(self) -> None:
        """Pull the newest version and take part."""
        head = Head(self.rank, self.ticket, PULL, self.progress.version, 0.0)
        self.ticket += 1
        reply = self.channel.join(head, self.flat.weights)
        self.read_version = reply.version
        self._advance(reply.version, reply.examples, reply.finished, ())

    def leave(self) -> None:
        self.channel.leave()

    def _exchange(self, phase: int, count: float, last: bool) -> None:
        gradient = self.flat.phase_message(phase)[:-TAIL]
        if not self.is_sync and self.job.optimizer.clip_norm is not None:
            whole = (0, self.flat.layout.numel)
            norm = math.sqrt(sum(block_square_norms(self.flat.layout, gradient, whole, phase))) / max(count, 1.0)
            gradient.mul_(clip_scale(norm, self.job.optimizer.clip_norm))
        head = Head(self.rank, self.ticket, phase, self.read_version, count, self.vote, rows=self._rows)
        if not self.is_sync and last and self.carried.tensors:
            head.carried, head.integers = to_numpy(self.carried.average_vector()).copy(), self.carried.integers()
        self.ticket += 1
        before = self.channel.bytes_sent
        reply = self.channel.exchange(head, gradient, self.flat.weights)
        self.meter.bytes_sent += self.channel.bytes_sent - before
        self.read_version = reply.version
        if reply.grad_norm is not None:
            self.meter.grad_norm = reply.grad_norm
        if last:
            self.meter.staleness_total += reply.staleness
            self.meter.staleness_max = max(self.meter.staleness_max, reply.staleness)
            if reply.carried is not None:
                self.carried.set_average(from_numpy(reply.carried))
                self.carried.load(reply.integers)
            self._advance(reply.version, reply.examples, reply.finished, reply.duties)

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
        else:
            self.finished = self.channel.judge(self.progress.version, metrics)
