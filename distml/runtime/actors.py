"""The processes of a run on Ray: workers and parameter servers. Thin: what they do is in `loop` and `strategies`.

    driver ── build, connect, load ──▶ worker, server            (each answered within `limits.start_s`)
    driver ◀── stream of events ────── worker.advance            (one long call; ends with the run or a lost peer)
    driver ── ping, request_stop ────▶ worker, server            (own thread of the worker: answered while it trains)
    worker ── push slice ────────────▶ server ── slice of the new weights ──▶ worker
    server k ── arrived ─────────────▶ server 0 ── apply entry n ──▶ server k

A crash shows as a broken connection to whoever waits for the process: its wait ends with `PeerLost`, its event stream
with `Interrupted`, and it stands ready to be connected anew. The driver decides what follows. torch is imported in
the constructors, so that a driver that imports this file does without.
"""

from __future__ import annotations

import asyncio
import contextlib
import faulthandler
import math
import os
import socket
import sys
import threading
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray

from distml.events import Event, Failed, Interrupted
from distml.exchange.channel import PULL, PeerLost
from distml.exchange.layout import Array, Layout
from distml.spec.schema import JobSpec, OptimizerSpec
from distml.tasks.sources import SourceTree

if TYPE_CHECKING:
    from torch import Tensor

    from distml.exchange.channel import Gradient, Head, Reply
    from distml.strategies.shard import Entry


def open_log(directory: str, name: str) -> None:
    """Send this process's output to the run's own log, where the run directory is on this host."""
    logs = os.path.join(directory, "logs")
    if os.path.isdir(logs):
        descriptor = os.open(os.path.join(logs, f"{name}.log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        os.close(descriptor)
        sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
        sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
        faulthandler.enable(file=sys.stderr)


def patience_s(job: JobSpec) -> float:
    """Longer than anything healthy takes: one exchange, or one piece of a worker's own work."""
    return max(PATIENCE_S, PATIENCE_FACTOR * job.limits.lost_after_s)


def blocked_cause(job: JobSpec, activity: str, motionless_s: float) -> str:
    """Why a process that blocks in its own work is ended, one line."""
    allowed = f"it has not moved in {activity} for {motionless_s:.0f} s, of {patience_s(job):g} s allowed"
    return (f"{allowed}, and was ended; if that is no block, raise limits.lost_after_s to more than a "
            f"{PATIENCE_FACTOR:.0f}th of what it needs")  # fmt: skip


def prepare_process(job: JobSpec) -> None:
    """Threads as the spec says, before torch starts its own."""
    threads = job.resources.cpus_per_worker
    os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = str(threads)
    import torch

    torch.set_num_threads(threads)


PATIENCE_S, PATIENCE_FACTOR = 60.0, 10.0
# A reply, where a shard's weights begin in the flat vector, and the weights: an array, or [reference to one].
Answer = tuple["Reply", int, "Array | list[Any]"]
# Measured with two workers: at 75 KB a step takes 7 ms with the weights in the answer and 12 ms with a reference;
# at 0.3 MB the two are alike, from 1 MB on the reference is faster.
INLINE_BYTES = 100_000


class RayChannel:
    """A worker's way to the server actors.

    One message per shard and direction: a worker pushes each server its slice; a server puts new weights into the
    object store once for all workers that they are for, and answers each with the reference (small ones directly).
    """

    clears_gradients = False

    def __init__(self, servers: list[Any], job: JobSpec, layout: Layout, rank: int, generation: int) -> None:
        self.servers, self.layout, self.rank, self.bytes_sent = servers, layout, rank, 0
        self.ranges = [layout.shard(index, len(servers)) for index in range(len(servers))]
        self.generation, self.calls = generation, 0
        self.patience_s = job.limits.lost_after_s

    def exchange(self, head: Head, gradient: Gradient, weights: Tensor) -> Reply:
        """Push one slice to each server, wait until the gradient is applied, pull one slice from each."""
        return self.take(self.push(head, gradient), weights)

    def push(self, head: Head, gradient: Gradient) -> tuple[int, list[Any]]:
        """Push one slice or payload to each server; what to wait for."""
        from distml.exchange.flat import to_numpy
        from distml.strategies.shard import shard_slice

        head.ticket += self.generation * 10**9
        if isinstance(gradient, list):
            parts = [to_numpy(payload) for payload in gradient]
        else:
            whole = to_numpy(gradient)
            parts = [whole[shard_slice(self.layout, own, head.phase)] for own in self.ranges]
        calls = [server.push.remote(head if index == 0 else (head.rank, head.ticket, head.phase), parts[index])
                 for index, server in enumerate(self.servers)]  # fmt: skip
        self.bytes_sent += sum(part.nbytes for part in parts)
        return head.ticket, calls

    def take(self, pushed: tuple[int, list[Any]], weights: Tensor) -> Reply:
        """Wait until it is applied, pull one slice from each server."""
        ticket, calls = pushed
        awaited = f"gradient {ticket} of rank {self.rank} to be applied"
        from distml.exchange.flat import borrowed

        answers: list[Answer] = self._get(calls, awaited)
        references = [piece[0] for _, _, piece in answers if isinstance(piece, list)]
        fetched = iter(self._get(references, awaited) if references else ())
        for _, start, piece in answers:
            array: Array = next(fetched) if isinstance(piece, list) else piece
            weights[start : start + array.size].copy_(borrowed(array))
            self.bytes_sent += array.nbytes
        return answers[0][0]

    def join(self, head: Head, weights: Tensor) -> Reply:
        """Pull the newest version."""
        return self.exchange(head, weights[:0], weights)

    def leave(self) -> None:
        """Take no part."""
        self._get([self.servers[0].leave.remote(self.rank)], "leave")

    def load(self, shared: Mapping[str, Any]) -> None:
        """The servers load for themselves."""

    def captured(self, version: int, carried: dict[str, Array]) -> dict[str, Any] | None:
        """The servers have it."""
        return None

    def kept(self, version: int, carried: dict[str, Array]) -> dict[str, Any] | None:
        """The servers keep it."""
        return None

    def live_optimizer(self) -> OptimizerSpec:
        """Server 0's."""
        spec: OptimizerSpec = self._get([self.servers[0].live_optimizer.remote()], "the optimiser's block")[0]
        return spec

    def judge(self, version: int, metrics: dict[str, float]) -> str | None:
        """Report an evaluation."""
        verdict: str | None = self._get([self.servers[0].judge.remote(self.rank, version, metrics)], "the verdict")[0]
        return verdict

    def all_gather(self, payload: bytes) -> list[bytes]:
        """Everyone's payload, through server 0."""
        self.calls += 1
        number = self.generation * 10**9 + self.calls
        parts: list[bytes] = self._get([self.servers[0].gather.remote(self.rank, number, payload)], "all workers")[0]
        return parts

    def _get(self, calls: list[Any], awaited: str) -> list[Any]:
        """Answers of the servers. The wait ends when a server dies or is told to interrupt; the driver sees to that."""
        while True:
            try:
                return list(ray.get(calls, timeout=self.patience_s))
            except ray.exceptions.GetTimeoutError:
                print(f"rank {self.rank} still waits for {awaited} after {self.patience_s:g} s", flush=True)
            except PeerLost:
                raise
            except ray.exceptions.RayTaskError as error:
                raise error.cause from error  # what went wrong there is not a lost peer
            except ray.exceptions.RayError as error:
                raise PeerLost(f"rank {self.rank} waited for {awaited}: {type(error).__name__}") from error


Hosts = tuple[tuple[int, ...], ...]


@dataclass
class Way:
    """How a worker reaches the others.

    Attributes:
        host, port: of rank 0's rendezvous; None: there is no process group.
        servers: their handles.
        generation: how often the run has been connected.
        segment: process and descriptor that have this host's shared memory open.
        pids: of the workers of this host, in rank order.
        rejoins: the others are at work already.
        keeps: the segment has room for states that are kept for a recovery.
        token: of all workers that are connected together (see `ranks_folder_name`).
        until: the version at which the run ends for now.
    """

    host: str | None
    port: int
    servers: list[Any]
    generation: int
    segment: tuple[int, int] | None = None
    pids: list[int] = field(default_factory=list)
    rejoins: bool = False
    keeps: bool = False
    token: str = ""
    until: int | None = None


@ray.remote(num_cpus=0, max_restarts=0, concurrency_groups={"control": 1})
class WorkerActor:
    """One worker's process."""

    def __init__(
        self, rank: int, job_json: str, directory: str, snapshot_every: int | None, injections: tuple[str, ...]
    ) -> None:
        open_log(directory, f"worker-{rank}")
        self.job = JobSpec.model_validate_json(job_json, by_alias=True, by_name=False)
        self.rank, self.snapshot_every, self.injections = rank, snapshot_every, injections
        self.checkpoints = Path(directory) / "checkpoints"
        self.trainer: Any = None
        self.group: Any = None
        self.busy = threading.Lock()
        prepare_process(self.job)
        self._import_libraries()

    def _import_libraries(self) -> None:
        """Now, while the other workers do, and before rank 0 is asked for what only it does."""
        import torch

        from distml.strategies.build import import_libraries

        self.device = torch.device("cuda", 0) if self.job.resources.gpus_per_worker else torch.device("cpu")
        with contextlib.suppress(ImportError):  # where it is needed, it is said
            import_libraries(self.job, self.device)

    def build(
        self, directory: str, files: dict[str, str], start_weights: Mapping[str, Array] | None, hosts: Hosts | None
    ) -> dict[str, Any]:
        """Build task, stream and replica; what all ranks must agree on, or `{"error": ...}`.

        `hosts` are the ranks of each host, where the workers share memory.
        """
        from distml.errors import UsageError
        from distml.exchange.flat import to_numpy
        from distml.loop import Trainer
        from distml.tasks.build import build_task, describe

        try:
            SourceTree(directory, files).install()
            task = build_task(self.job)
            size, shares = self.job.resources.workers, hosts is not None
            self.trainer = Trainer(self.job, task, self.rank, size, self.device, self.snapshot_every, self.injections,
                                   in_shared_memory=shares)  # fmt: skip
            self.trainer.build(start_weights)
        except UsageError as error:
            return {"error": str(error)}
        except Exception as error:
            import traceback

            traceback.print_exc()
            return {"error": f"the task cannot be built: {describe(error)}"}
        strategy = self.trainer.strategy
        description = {
            "fingerprint": strategy.fingerprint(), "layout": strategy.layout.to_json(),
            "agenda": strategy.agenda_arguments, "phases": len(strategy.phases), "host": socket.gethostname(),
            "address": ray.util.get_node_ip_address(), "pid": os.getpid(),
            "node": ray.get_runtime_context().get_node_id(),
        }  # fmt: skip
        self.hosts = hosts
        if hosts is not None:
            from distml.exchange.segment import free_bytes

            self.neighbours = next(ranks for ranks in hosts if self.rank in ranks)
            self.regions = {keeps: strategy.regions(len(self.neighbours), keeps) for keeps in (False, True)}
            description |= {"shared_bytes_free": free_bytes(), "regions": self.regions,
                            "too_large": strategy.too_large_to_share()}  # fmt: skip
        if self.rank == 0:
            description["frozen"] = {name: to_numpy(t).copy() for name, t in strategy.frozen().items()}
        return description

    def take(self, job_json: str) -> None:
        """Another job, for the next `build`."""
        self.job = JobSpec.model_validate_json(job_json, by_alias=True, by_name=False)

    def take_rank(self, rank: int, job_json: str, injections: tuple[str, ...]) -> None:
        """Another rank in a group of another size, for the next `build`."""
        open_log(str(self.checkpoints.parent), f"worker-{rank}")
        self.rank, self.injections = rank, injections
        self.job = JobSpec.model_validate_json(job_json, by_alias=True, by_name=False)

    def live(self, paths: Sequence[str]) -> dict[str, Any]:
        """Path -> value as this worker and its servers have it."""
        from distml.population.live import live_values

        return live_values(self.trainer, paths)

    def answer_probe(self, token: str) -> str | None:
        """Whether the driver's run directory is this process's too; else why not."""
        from distml.runs.probe import answer

        return answer(self.checkpoints, token, self.rank)

    def plan_facts(self) -> dict[str, Any]:
        """What a plan wants to know of this rank."""
        from distml.tasks.traced import plan_facts

        return plan_facts(self.job, self.trainer.task)

    def start_weights(self) -> Array:
        """The flat vector [N] that was built, as an object that the driver owns."""
        from distml.exchange.flat import to_numpy

        return to_numpy(self.trainer.strategy.flat.weights).copy()

    def open_rendezvous(self, address: str) -> int:
        """Listen for the other ranks; the port."""
        from distml.exchange.process_group import open_rendezvous

        self.listener = open_rendezvous(address)
        return int(self.listener.getsockname()[1])

    def open_segment(self, keeps: bool) -> tuple[int, int]:
        """Create this host's segment; where its peers find it: process id and descriptor."""
        from distml.errors import UsageError
        from distml.exchange.segment import NoSharedMemory, Segment

        if self.group is not None:
            self._leave_group()
        try:
            self.segment = Segment.create(self.regions[keeps])
        except NoSharedMemory as reason:
            raise UsageError(f"no shared memory for the workers' exchange: {reason}; free or enlarge it") from reason
        return os.getpid(), self.segment.descriptor

    def connect(self, way: Way) -> None:
        """Join the group, or take the way to the servers."""
        if self.group is not None:
            self._leave_group()
        self.generation = way.generation
        self.trainer.strategy.pause_at(way.until)
        self.trainer.save_parts_in(self.checkpoints, way.token)
        wire = self._join_wire(way) if way.host is not None else None
        channel: Any = None
        if way.segment is not None:
            self.group = self._join_host(way, wire)
        else:
            self.group = wire
        if way.servers:
            layout = self.trainer.strategy.flat.layout
            channel = RayChannel(way.servers, self.job, layout, self.rank, way.generation)
        elif way.segment is not None and not self.job.strategy.is_synchronous:
            channel = self._become_server(way)
        self.trainer.connect(self.group, channel)

    def _leave_group(self) -> None:
        self.group.close()
        self.group = None

    def _join_wire(self, way: Way) -> Any:
        """The group between processes, or between the first ranks of hosts that share memory."""
        from distml.exchange.process_group import ProcessGroup

        assert way.host is not None
        rank, size = self.rank, self.job.resources.workers
        if self.hosts is not None:
            if self.rank != self.neighbours[0]:
                return None
            rank, size = self.hosts.index(self.neighbours), len(self.hosts)
        listener = self.listener if self.rank == 0 else None
        own_address = way.host if way.host == "127.0.0.1" else ray.util.get_node_ip_address()
        device = self.trainer.device
        return ProcessGroup(rank, size, way.host, way.port, listener, device, patience_s(self.job), own_address)

    def _join_host(self, way: Way, wire: Any) -> Any:
        from distml.exchange.segment import Segment
        from distml.exchange.shared_memory import Host, SharedMemoryGroup

        assert way.segment is not None
        assert self.hosts is not None
        pid, descriptor = way.segment
        segment = self.segment if pid == os.getpid() else Segment.open(pid, descriptor, self.regions[way.keeps])
        at = self.trainer.injector.at
        host = Host(segment, list(self.neighbours), self.rank, way.pids, patience_s(self.job), at)
        return SharedMemoryGroup(host, [list(ranks) for ranks in self.hosts], wire)

    def _become_server(self, way: Way) -> Any:
        from distml.strategies.agenda import Agenda
        from distml.strategies.shared_servers import SharedServers

        assert way.segment is not None
        strategy = self.trainer.strategy
        joins = "rejoined" if way.rejoins else "joined"
        state = "new" if way.segment[0] == os.getpid() else joins
        agenda = Agenda(self.job, **strategy.agenda_arguments)
        return SharedServers(self.job, strategy.flat, strategy.carried, agenda, len(strategy.phases),
                             self.group.host, state, way.generation)  # fmt: skip

    def load(self, shared: Mapping[str, Any] | None, own: Mapping[str, Any] | None) -> None:
        """Go back to a state."""
        if shared is not None:
            self.trainer.load(shared, own)

    def advance(self) -> Iterator[Event]:
        """Train, yielding events, until the run ends, fails, or a peer is lost."""
        from distml.loop import failure

        try:
            yield from self.trainer.advance()
            self.trainer.strategy.leave()
        except PeerLost as lost:
            print(f"interrupted: {lost}", flush=True)
            if self.group is not None:
                self.group.close()
            yield Interrupted(self.rank, self.trainer.strategy.progress.version, str(lost))
        except Exception as error:
            failed: Failed = failure(self.trainer, error)
            print(failed.traceback, flush=True)
            yield failed

    def evaluate_part(self, split: str, index: int, count: int, saved: Mapping[str, Any]) -> dict[str, Any]:
        """Sums and counts of one part of a split with a checkpoint's model, or `{"error": ...}`."""
        from distml.tasks.build import describe

        try:
            self.trainer.load_for_test(saved)
            self.trainer.activity = "evaluate"
            means = self.trainer.evaluate_part(split, index, count)
        except Exception as error:
            return {"error": describe(error)}
        finally:
            self.trainer.activity = "end"
        return {"means": {name: (float(mean.total), float(mean.count)) for name, mean in means.items()}}

    @ray.method(concurrency_group="control")
    def ping(self) -> tuple[str, float]:
        """Alive: what it is doing, and for how many seconds it has not moved in it."""
        return ("start", 0.0) if self.trainer is None else (self.trainer.activity, self.trainer.motionless_s())

    @ray.method(concurrency_group="control")
    def interrupt(self, generation: int) -> None:
        """End the waits in shared memory, here and at the neighbours, if they are still of this connection."""
        if self.group is not None and self.hosts is not None and generation == self.generation:
            self.group.host.abort()

    @ray.method(concurrency_group="control")
    def shared_segment(self) -> tuple[int, int] | None:
        """Where a worker that takes a dead one's place finds this host's segment; None: it can only go back."""
        from distml.strategies.shared_servers import is_intact

        if self.group is None or self.group.host.segment.descriptor < 0:
            return None
        host = self.group.host
        whole = is_intact(host.segment.descriptor, self.trainer.strategy.channel.words, self.job.limits.heartbeat_s)
        if not whole or host.words.get(0) or self.trainer.strategy.channel.is_finished():
            return None
        return os.getpid(), host.segment.descriptor

    @ray.method(concurrency_group="control")
    def request_stop(self) -> None:
        """Vote to end at the next version."""
        if self.trainer is not None:
            self.trainer.strategy.stop_requested = True


@ray.remote(num_cpus=0, max_restarts=0)
class ServerActor:
    """One parameter server's process: a shard, and on server 0 the clock. All methods share one event loop."""

    def __init__(self, index: int, job_json: str, directory: str, injections: tuple[str, ...]) -> None:
        open_log(directory, f"server-{index}")
        self.job = JobSpec.model_validate_json(job_json, by_alias=True, by_name=False)
        self.index = index
        prepare_process(self.job)
        import distml.strategies.parameter_server  # noqa: F401  (now, while the workers build the task)
        from distml.inject import Injector

        self.injector = Injector(injections, role="server", index=index)
        self.waiting: dict[tuple[int, int], asyncio.Future[Answer]] = {}
        self.gathering: dict[int, dict[int, bytes]] = {}
        self.gathered: dict[int, asyncio.Future[list[bytes]]] = {}
        self.queue: deque[Entry] = deque()
        self.committing = False
        self.turn = asyncio.Condition()
        self.interrupted = False
        self.failed: Exception | None = None

    async def build(
        self, layout: list[dict[str, Any]], agenda: dict[str, Any], phases: int, servers: list[Any]
    ) -> tuple[str, int]:
        """Lay out the shard; the node and process id of this server."""
        from distml.strategies.agenda import Agenda
        from distml.strategies.parameter_server import Clock
        from distml.strategies.shard import Shard

        self.servers = servers
        plan = Agenda(self.job, **agenda)
        index = Layout.from_json(layout)
        self.shard = Shard(self.job, index, index.shard(self.index, len(servers)), plan.budget_steps)
        self.clock = Clock(self.job, plan, phases)
        return ray.get_runtime_context().get_node_id(), os.getpid()

    async def load(
        self, weights: Array, moments: Mapping[str, Array], clock: Mapping[str, Any] | None, ranks: list[int]
    ) -> None:
        """Start from whole vectors; these workers take part."""
        import torch

        from distml.exchange.flat import from_numpy

        self._interrupt()
        self.shard.load(
            from_numpy(weights), {n: from_numpy(v) for n, v in moments.items()}, clock["updates"] if clock else 0
        )
        self.shard.sums = torch.empty_like(self.shard.weights)  # gradients lie in Ray's memory, which is read-only
        if clock is not None:
            self.clock.load_state(clock)
        self.clock.number, self.applied = 0, 0
        self.clock.begin(ranks)
        self.interrupted = False

    def _interrupt(self) -> None:
        futures: list[asyncio.Future[Any]] = [*self.waiting.values(), *self.gathered.values()]
        for future in futures:
            if not future.done():
                future.set_exception(PeerLost("the run goes back to an earlier state"))
        self.waiting, self.gathered, self.gathering = {}, {}, {}
        self.queue.clear()

    async def interrupt(self) -> None:
        """End every worker's wait, and those that begin before the next `load`."""
        self.interrupted = True
        self._interrupt()

    def _check_open(self) -> None:
        if self.interrupted:
            raise PeerLost("the run goes back to an earlier state")

    # -------------------------------------------------------------------------------------------------------- exchange
    async def push(self, head: Any, gradient: Array) -> Answer:
        """Hold a slice, wait until its entry is applied; the reply and this shard's new weights."""
        self._check_open()
        rank, ticket, phase = head if isinstance(head, tuple) else (head.rank, head.ticket, head.phase)
        if phase != PULL:
            from distml.exchange.flat import borrowed

            self.shard.hold(rank, ticket, self.shard.decoded(phase, borrowed(gradient)))
        answer: asyncio.Future[Answer]
        answer = self.waiting[rank, ticket] = asyncio.get_running_loop().create_future()
        if self.index == 0:
            self.injector.reach(self.clock.version)
            await self._commit(self.clock.arrive(0, rank, ticket, head))
        else:
            self.servers[0].arrived.remote(self.index, rank, ticket)
        return await answer

    async def arrived(self, server: int, rank: int, ticket: int) -> None:
        """On server 0: a slice has arrived elsewhere."""
        await self._commit(self.clock.arrive(server, rank, ticket))

    async def _commit(self, entries: list[Entry]) -> None:
        """On server 0: apply entries everywhere, strictly one after the other."""
        self.queue.extend(entries)
        if self.committing:
            return
        self.committing = True
        try:
            while self.queue:
                entry = self.queue.popleft()
                norm = None
                others = self.servers[1:]
                if entry.needs_norm:
                    squares = self.shard.reduce(entry)
                    for rest in await asyncio.gather(*(server.reduce.remote(entry) for server in others)):
                        squares += rest
                    norm = math.sqrt(sum(squares))
                for server in others:
                    server.apply.remote(entry, norm)
                self._apply(entry, norm, reduced=entry.needs_norm)
                async with self.turn:
                    self.turn.notify_all()
        finally:
            self.committing = False

    async def reduce(self, entry: Entry) -> list[float]:
        """On the others: sum the entry's gradients when its turn has come; the blocks' squared norms."""
        await self._applied(entry.number - 1)
        self.injector.reach(entry.version)
        return self.shard.reduce(entry)

    async def apply(self, entry: Entry, norm: float | None) -> None:
        """On the others: apply the entry when its turn has come."""
        await self._applied(entry.number - 1)
        self.injector.reach(entry.version)
        try:
            self._apply(entry, norm, reduced=entry.needs_norm)
        except Exception as error:  # nobody waits for this call: the next ping says so
            self.failed = error
            raise
        async with self.turn:
            self.turn.notify_all()

    async def _applied(self, number: int) -> None:
        """Wait until entry `number` is applied here."""
        async with self.turn:
            await self.turn.wait_for(lambda: self.applied >= number)

    def _apply(self, entry: Entry, norm: float | None, reduced: bool) -> None:
        if not reduced:
            self.shard.reduce(entry)
        self.shard.apply(entry, norm)
        self.applied = entry.number
        if entry.phase == PULL:
            self._give_up(entry.members)
        answers = {member: self.waiting.pop(member) for member in entry.members if member in self.waiting}
        start, piece = self._piece(entry) if answers else (0, [])
        for member, answer in answers.items():
            entry.replies[member].grad_norm = norm
            if not answer.done():
                answer.set_result((entry.replies[member], start, piece))

    def _piece(self, entry: Entry) -> tuple[int, Array | list[Any]]:
        """This shard's part of what an entry's members are sent, once for all of them: its start, and the weights.

        A reference in a list is passed on as it is. It keeps the object alive until the last worker has taken it.
        """
        from distml.exchange.flat import to_numpy
        from distml.strategies.parameter_server import answered_range

        first, last = answered_range(self.shard.layout, entry, self.clock.is_sync)
        start, stop = self.shard.range
        start, stop = max(start, first), max(start, first, min(stop, last))
        own = to_numpy(self.shard.weights[start - self.shard.range[0] : stop - self.shard.range[0]])
        return start, own.copy() if own.nbytes <= INLINE_BYTES else [ray.put(own)]

    def _give_up(self, members: list[tuple[int, int]]) -> None:
        """Nobody waits for the answers to what these ranks pushed before they joined anew."""
        for rank, ticket in members:
            for key in [key for key in self.waiting if key[0] == rank and key[1] < ticket]:
                self.waiting.pop(key).cancel()

    # ------------------------------------------------------------------------------------------------------ membership
    async def leave(self, rank: int) -> tuple[str | None, int]:
        """On server 0: a worker takes no part any more; why the run is over, and the last entry ordered so far."""
        await self._commit(self.clock.leave(rank))
        return self.clock.finished, self.clock.number

    async def discard(self, rank: int, number: int) -> None:
        """Drop what a worker that is gone has pushed here, once the entries up to `number` have used their part."""
        await self._applied(number)
        self.shard.discard(rank)

    async def judge(self, rank: int, version: int, metrics: dict[str, float]) -> str | None:
        """An evaluation's verdict."""
        self._check_open()
        verdict, entries = self.clock.judge(rank, version, metrics)
        await self._commit(entries)
        return verdict

    async def gather(self, rank: int, number: int, payload: bytes) -> list[bytes]:
        """A collective of all workers."""
        self._check_open()
        board = self.gathering.setdefault(number, {})
        board[rank] = payload
        if number not in self.gathered:
            self.gathered[number] = asyncio.get_running_loop().create_future()
        answer, size = self.gathered[number], self.job.resources.workers
        if len(board) == size:
            del self.gathering[number], self.gathered[number]
            answer.set_result([board[r] for r in range(size)])
        return await answer

    async def take(self, job_json: str) -> None:
        """Another job, for the next `build`."""
        self.job = JobSpec.model_validate_json(job_json, by_alias=True, by_name=False)

    async def live_optimizer(self) -> OptimizerSpec:
        """The block by which this shard is updated."""
        return self.shard.optimizer.spec

    async def captured(self, version: int) -> dict[str, Any] | None:
        """This shard's state at a version, if it is still there; it is handed over once."""
        return self.shard.take_capture(version)

    async def ping(self) -> tuple[str, float]:
        """Alive, and nothing has failed unseen."""
        if self.failed is not None:
            raise self.failed
        return "serving", 0.0


def end_process(pid: int) -> None:
    """SIGKILL, also for a process that is stopped; gone already is fine."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, 9)
