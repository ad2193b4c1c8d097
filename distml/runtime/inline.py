"""The inline runtime: every logical worker in its own thread of one process, exactly one of them at a time.

The baton passes at every exchange call: in rank order under synchronous strategies, else drawn from the seed and
`inline.speeds`. Each worker's random states are swapped with it. So a run is deterministic, breakpoints work, and the
loop's text is the same as on a cluster. What a thread waits for: the baton, given to it when its predicate holds; a
state in which nobody can go on is an error that names what each one awaited.
"""

from __future__ import annotations

import math
import queue
import random
import secrets
import socket
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distml.errors import RunError, UsageError
from distml.events import Event, Failed
from distml.exchange.channel import PULL, Gradient, Head, PeerLost, Reply
from distml.exchange.flat import from_numpy, to_numpy
from distml.exchange.layout import Array, Layout
from distml.exchange.process_group import ring_bytes
from distml.loop import Trainer, failure, random_states, set_random_states
from distml.runtime.cut import Cut, join_captures
from distml.runtime.group import DIFFERENT_MODELS, Description, Lost
from distml.spec.schema import JobSpec, OptimizerSpec, ParameterServerSpec
from distml.strategies.agenda import Agenda
from distml.strategies.parameter_server import Clock, ParameterServer, answered_range
from distml.strategies.shard import Entry, Shard
from distml.tasks.base import Mean
from distml.tasks.build import build_task, describe
from distml.tasks.data import mix
from distml.tasks.sources import SourceTree

Choose = Callable[[list[int]], int]


class Baton:
    """Lets exactly one of several threads run."""

    def __init__(self, count: int, choose: Choose) -> None:
        self.choose = choose
        self.turns = [threading.Event() for _ in range(count)]
        self.waits: dict[int, tuple[Callable[[], bool], str]] = {r: (lambda: True, "the start") for r in range(count)}
        self.broken: str | None = None

    def start(self) -> None:
        """Give the baton to the first."""
        self._pass_on()

    def take(self, rank: int) -> None:
        """Called first by each thread: wait for its first turn."""
        self.turns[rank].wait()
        self.turns[rank].clear()

    def wait(self, rank: int, ready: Callable[[], bool], awaited: str) -> None:
        """Give the baton away until `ready` holds and it is this rank's turn.

        Raises:
            PeerLost: nobody can go on, or the group is being ended.
        """
        self.waits[rank] = (ready, awaited)
        if len(self.waits) == 1 and ready() and self.broken is None:
            return
        states = random_states()
        self._pass_on()
        self.take(rank)
        set_random_states(states)
        if self.broken is not None:
            raise PeerLost(self.broken)

    def leave(self, rank: int) -> None:
        """This thread ends."""
        self.waits.pop(rank, None)
        self._pass_on()

    def stop(self, reason: str) -> None:
        """Whoever waits next, or waits now, ends with `PeerLost`."""
        self.broken = self.broken or reason

    def _pass_on(self) -> None:
        if not self.waits:
            return
        able = [rank for rank, (ready, _) in sorted(self.waits.items()) if self.broken is not None or ready()]
        if not able:
            awaited = "; ".join(f"rank {rank} waits for {what}" for rank, (_, what) in sorted(self.waits.items()))
            self.stop(f"nobody can go on: {awaited}")
            able = sorted(self.waits)
        self.turns[self.choose(able)].set()


def in_rank_order(count: int) -> Choose:
    """The next rank after the last chosen one."""
    last = -1

    def choose(able: list[int]) -> int:
        nonlocal last
        last = min(able, key=lambda rank: (rank - last - 1) % count)
        return last

    return choose


def drawn(seed: int, speeds: list[float]) -> Choose:
    """Drawn with probabilities proportional to the workers' speeds."""
    generator = random.Random(mix(seed, 3))
    return lambda able: generator.choices(able, [speeds[rank] for rank in able])[0]


class Board:
    """Where inline ranks meet: one slot per collective, in the order in which each rank calls."""

    def __init__(self, baton: Baton, size: int) -> None:
        self.baton, self.size = baton, size
        self.calls = [0] * size
        self.slots: dict[int, dict[int, Any]] = {}
        self.sums: dict[int, Tensor] = {}

    def meet(self, rank: int, value: Any) -> tuple[int, list[Any]]:
        """(number of this collective, everyone's values in rank order).

        Raises:
            RuntimeError: ranks call different collectives.
        """
        number = self.calls[rank]
        self.calls[rank] += 1
        slot = self.slots.setdefault(number, {})
        slot[rank] = value
        for other in slot:
            if _kind(slot[other]) != _kind(value):
                raise RuntimeError(f"ranks call different collectives: rank {other} is at {_kind(slot[other])}, "
                                   f"rank {rank} at {_kind(value)}")  # fmt: skip
        self.baton.wait(rank, lambda: len(slot) == self.size, f"collective {number} of all {self.size} ranks")
        for old in [n for n in self.slots if n < min(self.calls) - 1]:
            self.slots.pop(old)
            self.sums.pop(old, None)
        return number, [slot[r] for r in range(self.size)]


def _kind(value: Any) -> str:
    """What a rank calls with this value."""
    if isinstance(value, Tensor):
        return f"all_reduce of {tuple(value.shape)}"
    return "all_to_all" if isinstance(value, list) else "all_gather"


class InlineGroup:
    """A rank's collective operations on the board; sums are taken in rank order."""

    def __init__(self, board: Board, rank: int) -> None:
        self.board, self.rank, self.size, self.bytes_sent = board, rank, board.size, 0

    def all_reduce(self, vector: Tensor) -> None:
        """Replace `vector` by the sum over ranks."""
        number, parts = self.board.meet(self.rank, vector.clone())
        if number not in self.board.sums:
            total = parts[0].clone()
            for part in parts[1:]:
                total.add_(part)
            self.board.sums[number] = total
        vector.copy_(self.board.sums[number])
        self.bytes_sent += ring_bytes(vector, self.size)

    def all_gather(self, payload: bytes) -> list[bytes]:
        """Everyone's payload."""
        self.bytes_sent += (self.size - 1) * len(payload)
        return self.board.meet(self.rank, payload)[1]

    def all_to_all(self, parts: Sequence[Tensor], lengths: Sequence[int]) -> list[Tensor]:
        """What each rank has for this one."""
        self.bytes_sent += sum(part.numel() for rank, part in enumerate(parts) if rank != self.rank)
        copies = {id(part): part.clone() for part in parts}  # the same part may go to all
        rows = self.board.meet(self.rank, [copies[id(part)] for part in parts])[1]
        return [row[self.rank] for row in rows]


class InlineServers:
    """All shards and the clock in this process."""

    def __init__(self, job: JobSpec, layout: Layout, agenda: Agenda, num_phases: int) -> None:
        assert isinstance(job.strategy, ParameterServerSpec)
        self.layout, self.clock = layout, Clock(job, agenda, num_phases)
        ranges = [layout.shard(index, job.strategy.servers) for index in range(job.strategy.servers)]
        self.shards = [Shard(job, layout, own, agenda.budget_steps) for own in ranges]
        self.replies: dict[tuple[int, int], tuple[Reply, int, Tensor]] = {}

    def load(self, weights: Tensor, moments: Mapping[str, Tensor], clock: Mapping[str, Any] | None) -> None:
        """Start from whole vectors."""
        for shard in self.shards:
            shard.load(weights, moments, clock["updates"] if clock else 0)
        if clock is not None:
            self.clock.load_state(clock)

    def push(self, head: Head, gradient: Gradient) -> int:
        """One gradient arrives at all shards; its bytes."""
        num_bytes = 0
        for index, shard in enumerate(self.shards):
            if head.phase != PULL:
                own = gradient[index] if isinstance(gradient, list) else gradient[shard.phase_slice(head.phase)]
                shard.hold(head.rank, head.ticket, shard.decoded(head.phase, own.clone()))
                num_bytes += own.nbytes
            self.commit(self.clock.arrive(index, head.rank, head.ticket, head if index == 0 else None))
        return num_bytes

    def commit(self, entries: list[Entry]) -> None:
        """Apply entries on all shards, and lay out the answers."""
        for entry in entries:
            squares = [square for shard in self.shards for square in shard.reduce(entry)]
            norm = math.sqrt(sum(squares)) if entry.needs_norm else None
            for shard in self.shards:
                shard.apply(entry, norm)
            start, stop = answered_range(self.layout, entry, self.clock.is_sync)
            weights = self.weights()[start:stop]
            for member, reply in entry.replies.items():
                reply.grad_norm = norm
                self.replies[member] = reply, start, weights

    def weights(self) -> Tensor:
        """All shards' weights (a copy)."""
        return torch.cat([shard.weights for shard in self.shards])


class InlineChannel:
    """A rank's way to the inline servers."""

    clears_gradients = False

    def __init__(self, servers: InlineServers, board: Board, rank: int) -> None:
        self.servers, self.board, self.rank, self.bytes_sent = servers, board, rank, 0
        self.is_ahead = False  # prefetch: a gradient is under way while another is computed

    def exchange(self, head: Head, gradient: Gradient, weights: Tensor) -> Reply:
        """Push, wait until applied, pull."""
        self.bytes_sent += self.servers.push(head, gradient)
        return self.take((head.rank, head.ticket), weights)

    def push(self, head: Head, gradient: Gradient) -> tuple[int, int]:
        """Push; the first time, the others have their turn before the next gradient is computed."""
        self.bytes_sent += self.servers.push(head, gradient)
        if not self.is_ahead:
            self.board.baton.wait(self.rank, lambda: True, "its turn")
        self.is_ahead = True
        return head.rank, head.ticket

    def take(self, pushed: tuple[int, int], weights: Tensor) -> Reply:
        """Wait until it is applied, pull."""
        replies, computing = self.servers.replies, self.servers.clock.computing
        self.board.baton.wait(self.rank, lambda: pushed in replies, f"workers still computing: {sorted(computing)}")
        reply, start, newest = replies.pop(pushed)
        weights[start : start + newest.numel()].copy_(newest)
        self.bytes_sent += newest.numel() * newest.element_size()
        return reply

    def join(self, head: Head, weights: Tensor) -> Reply:
        """Pull the newest version."""
        self.is_ahead = False
        return self.exchange(head, weights[:0], weights)

    def leave(self) -> None:
        """Take no part."""
        self.servers.commit(self.servers.clock.leave(self.rank))

    def load(self, shared: Mapping[str, Any]) -> None:
        """The servers load for themselves."""

    def captured(self, version: int, carried: dict[str, Array]) -> dict[str, Any] | None:
        """The servers have it."""
        return None

    def kept(self, version: int, carried: dict[str, Array]) -> dict[str, Any] | None:
        """The servers keep it."""
        return None

    def judge(self, version: int, metrics: dict[str, float]) -> str | None:
        """Report an evaluation."""
        verdict, entries = self.servers.clock.judge(self.rank, version, metrics)
        self.servers.commit(entries)
        return verdict

    def live_optimizer(self) -> OptimizerSpec:
        """The shards'."""
        return self.servers.shards[0].optimizer.spec

    def all_gather(self, payload: bytes) -> list[bytes]:
        """Everyone's payload."""
        return self.board.meet(self.rank, payload)[1]


def add_means(sums: dict[str, tuple[float, float]], means: Mapping[str, Mean]) -> None:
    """Add named means to named (total, count) pairs."""
    for name, mean in means.items():
        total, count = sums.get(name, (0.0, 0.0))
        sums[name] = total + float(mean.total), count + float(mean.count)


class InlineRuntime:
    """A `WorkerGroup` of threads."""

    def __init__(
        self, job: JobSpec, sources: SourceTree, injections: tuple[str, ...] = (), directory: Path | None = None
    ) -> None:
        self.job, self.sources, self.injections, self.directory = job, sources, injections, directory
        self.size = job.resources.workers
        self.wants_more = False
        self.say: Callable[[str], None] = lambda text: None
        self.trainers: list[Trainer] = []
        self.threads: list[threading.Thread] = []
        self.queue: queue.Queue[Event | None] = queue.Queue()
        self.handled = threading.Event()
        self.closing = False
        self.servers: InlineServers | None = None

    def build(self, start_weights: Mapping[str, Array] | None) -> Description:
        """Build every worker's replica in turn."""
        if self.job.strategy.keeps_parts and self.size > 1:
            raise UsageError(f"strategy {self.job.strategy.label} with {self.size} workers needs as many processes, "
                             "and inline is one; use --runtime ray, or set resources.workers to 1")  # fmt: skip
        torch.set_num_threads(self.job.resources.cpus_per_worker)
        self.sources.install()
        self.start_weights = start_weights
        return self._build()

    def _build(self) -> Description:
        start_weights = self.start_weights
        self.trainers, self.states = [], []
        for rank in range(self.size):
            trainer = Trainer(self.job, build_task(self.job), rank, self.size, injections=self.injections)
            try:
                trainer.build(start_weights)
            except UsageError:
                raise
            except Exception as error:
                raise UsageError(f"the task cannot be built: {describe(error)}") from error
            self.sources.mark_imported()
            self.trainers.append(trainer)
            self.states.append(random_states())
        prints = {trainer.strategy.fingerprint() for trainer in self.trainers}
        if len(prints) > 1:
            raise UsageError(DIFFERENT_MODELS)
        strategy = self.trainers[0].strategy
        frozen = {name: to_numpy(tensor).copy() for name, tensor in strategy.frozen().items()}
        return Description(strategy.layout, frozen, *self.whereabouts())

    def plan_facts(self) -> dict[str, Any]:
        """Of this process."""
        from distml.tasks.traced import plan_facts

        return plan_facts(self.job, self.trainers[0].task)

    def take(self, job: JobSpec) -> Description:
        """Build every worker's replica anew."""
        self.job = job
        return self._build()

    def live(self, paths: Sequence[str]) -> dict[str, Any]:
        """Of rank 0."""
        from distml.population.live import live_values

        return live_values(self.trainers[0], paths)

    def begin(self, cut: Cut | None, until: int | None = None) -> None:
        """Connect and load."""
        self.load(cut, until)

    def load(self, cut: Cut | None, until: int | None = None) -> None:
        """Connect and load."""
        for trainer in self.trainers:
            trainer.strategy.pause_at(until)
        strategy = self.trainers[0].strategy
        choose = in_rank_order(self.size) if self.job.strategy.is_synchronous else drawn(
            self.job.seed, list(self.job.inline.speeds or [1.0] * self.size))  # fmt: skip
        self.baton = Baton(self.size, choose)
        board = Board(self.baton, self.size)
        if isinstance(strategy, ParameterServer):
            phases = len(strategy.phases)
            agenda = Agenda(self.job, **strategy.agenda_arguments)
            self.servers = InlineServers(self.job, strategy.layout, agenda, phases)
            moments = {n: from_numpy(v) for n, v in cut.shared["moments"].items()} if cut else {}
            weights = from_numpy(cut.shared["weights"]) if cut else strategy.flat.weights
            self.servers.load(weights, moments, cut.shared["clock"] if cut else None)
            self.servers.clock.begin(list(range(self.size)))
        for rank, trainer in enumerate(self.trainers):
            channel = InlineChannel(self.servers, board, rank) if self.servers else None
            if self.directory is not None:
                trainer.save_parts_in(self.directory / "checkpoints", secrets.token_hex(4))
            trainer.connect(InlineGroup(board, rank), channel)
            set_random_states(self.states[rank])
            if cut is not None:
                trainer.load(cut.shared, cut.own.get(rank))
            self.states[rank] = random_states()

    def events(self) -> Iterator[Event | Lost]:
        """With one worker the loop runs in the caller's thread; with several in theirs, one at a time."""
        if self.size == 1:
            set_random_states(self.states[0])
            yield from self._guarded(0)
            self.states[0] = random_states()
            return
        self.threads = [threading.Thread(target=self._run, args=(rank,), daemon=True) for rank in range(self.size)]
        for thread in self.threads:
            thread.start()
        self.baton.start()
        running = self.size
        while running:
            event = self.queue.get()
            if event is None:
                running -= 1
            else:
                yield event
                self.handled.set()

    def _run(self, rank: int) -> None:
        self.baton.take(rank)
        set_random_states(self.states[rank])
        try:
            for event in self._guarded(rank):
                self.queue.put(event)
                self.handled.wait()  # the driver is one of those of whom exactly one runs
                if self.closing:
                    return
                self.handled.clear()
        finally:
            self.states[rank] = random_states()
            self.queue.put(None)
            self.baton.leave(rank)

    def _guarded(self, rank: int) -> Iterator[Event]:
        """The worker's events; an exception becomes a `Failed`, and everyone else ends."""
        trainer = self.trainers[rank]
        try:
            yield from trainer.advance()
            trainer.strategy.leave()
        except PeerLost as lost:
            if "nobody can go on" in str(lost):
                yield Failed(rank, trainer.strategy.progress.version, "exchange", str(lost), "")
        except Exception as error:
            self.baton.stop(f"rank {rank} failed")
            yield failure(trainer, error)
        finally:
            trainer.activity = "idle"  # it stands still, and nobody may take that for a block

    def recover(self, cut: Cut | None) -> bool:
        """Threads do not die alone."""
        return True

    def regroup(self, cut: Cut | None) -> None:
        """One process has no more room."""

    def whereabouts(self) -> tuple[str, list[str]]:
        """This process."""
        return "in one process (inline)", [socket.gethostname()]

    def shared_state(self, version: int, carried: dict[str, Array]) -> dict[str, Any] | None:
        """From the shards' captures."""
        assert self.servers is not None
        pieces = [shard.take_capture(version) for shard in self.servers.shards]
        found = [piece for piece in pieces if piece is not None]
        if len(found) < len(pieces):
            return None
        return join_captures(found, carried)

    def kept(self, version: int) -> dict[str, Array] | None:
        """One process keeps nothing apart."""
        return None

    @property
    def activity(self) -> tuple[str, float]:
        """Of the worker that has not moved for the longest time."""
        return max(((one.activity, one.motionless_s()) for one in self.trainers), key=lambda pair: pair[1],
                   default=("start", 0.0))  # fmt: skip

    def request_stop(self) -> None:
        """Every worker votes at its next exchange."""
        for trainer in self.trainers:
            trainer.strategy.stop_requested = True

    def evaluate(self, split: str, saved: Mapping[str, Any]) -> dict[str, tuple[float, float]]:
        """In one part per worker, added up in rank order, as on Ray."""
        sums: dict[str, tuple[float, float]] = {}
        for rank, trainer in enumerate(self.trainers):
            try:
                trainer.load_for_test(saved)
                add_means(sums, trainer.evaluate_part(split, rank, self.size))
            except Exception as error:
                step = trainer.strategy.progress.version
                raise RunError(describe(error), role=f"rank {rank}", phase=f"evaluate {split}", step=step) from error
        return sums

    def close(self) -> None:
        """Let waiting threads end."""
        if self.threads:
            self.baton.stop("the run is being closed")
            self.closing = True
            self.handled.set()
            for thread in self.threads:
                thread.join(timeout=5.0)
        for trainer in self.trainers:
            trainer.strategy.close()
