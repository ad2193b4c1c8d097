"""The Ray runtime: one actor per worker and server, placed together, listened to, and replaced when one dies.

`RayRuntime` is the one class that owns actor handles. Its consumer is the driver: it asks for events and says when to
recover. Every wait has a limit: start-up by `limits.start_s`; training by a ping of each process every `heartbeat_s`,
where one that gives no answer for `lost_after_s` is ended (SIGKILL, so that a stopped one goes too) and reported as
`Lost`; so is one that blocks in its own work, ten times as long. Shutdown removes actors and placement group; a
private Ray ends with the run. No torch here.
"""

from __future__ import annotations

import contextlib
import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import ray
from ray.util.placement_group import PlacementGroup, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from distml.errors import RunError, UsageError
from distml.events import Event, Failed, Finished, Interrupted
from distml.exchange.channel import PeerLost
from distml.exchange.layout import Array, Layout
from distml.exchange.segment import Segment, lacking, read_kept
from distml.inject import Injection
from distml.memory import out_of_memory_kills
from distml.runs.probe import Probe
from distml.runtime.actors import ServerActor, Way, WorkerActor, blocked_cause, end_process, patience_s
from distml.runtime.connection import connect, diverted_output
from distml.runtime.cut import Cut, join_captures
from distml.runtime.deaths import CONNECTION_BROKE, cause_of_death
from distml.runtime.endings import close_within
from distml.runtime.group import DIFFERENT_MODELS, Description, Lost
from distml.runtime.nodes import Cuts, wait_for_verdict
from distml.runtime.placement import check_resources, place, server_node, wait_for_place
from distml.runtime.seats import Seat, nodes_of, seats_of
from distml.runtime.transport import Transport, by_host, choose, fall_back
from distml.spec.schema import JobSpec, ParameterServerSpec
from distml.strategies.agenda import SNAPSHOT_EVERY
from distml.tasks.sources import SourceTree

POLL_S = 0.2
STOP_PATIENCE_S = 2.0
SILENT_BEATS = 2  # heartbeats that a survivor has to leave an exchange with one that is silent
KEEP_FROM_BYTES = 2**20
CLOSE_PATIENCE_S = 5.0
UNSAID_S = 1.0  # of a connection that broke: until the raylet would have gone too, or have said that the process died


class ProcessLostError(Exception):
    """A process died, or a peer of it did, while the driver waited for its answer."""

    def __init__(self, role: str, cause: str, awaited: str) -> None:
        self.role, self.cause, self.awaited = role, cause, awaited
        super().__init__(f"{role} was lost while the driver waited for {awaited}: {cause}")


class RayRuntime:
    """A `WorkerGroup` of Ray actors.

    Args:
        job: the spec.
        sources: the user's files.
        address: of a running cluster; None: RAY_ADDRESS, the surrounding job's cluster, else a private Ray.
        directory: the run directory.
        injections: failures to cause.
        place: a placement group that somebody else removes, and its bundles for the workers.
        recovers: keep states to go back to when a process dies.
    """

    def __init__(
        self, job: JobSpec, sources: SourceTree, address: str | None, directory: Path, injections: tuple[str, ...] = (),
        place: PlacementGroup | None = None, recovers: bool = True,
    ) -> None:  # fmt: skip
        self.given_place, self.snapshot_every = place, SNAPSHOT_EVERY if recovers else None
        self.until: int | None = None
        self.job, self.sources, self.address, self.injections = job, sources, address, injections
        self.directory = str(directory.resolve())
        self.size = job.resources.workers
        self.wants_more = False
        self.say: Callable[[str], None] = lambda text: None
        self.num_servers = 0
        self.transport = Transport("none", "", ())
        self.keeps, self.segment = False, cast(Segment | None, None)
        self.job_json = job.model_dump_json(by_alias=True)
        self.workers: dict[int, Any] = {}
        self.servers: dict[int, Any] = {}
        self.facts: dict[int, dict[str, Any]] = {}
        self.places: dict[str, tuple[str, int]] = {}  # role -> node and process id
        self.streams: dict[int, Any] = {}
        self.pings: dict[str, tuple[Any, float]] = {}
        self.heard: dict[str, float] = {}
        self.asked: dict[str, float] = {}  # when it was last pinged
        self.phases: dict[str, str] = {}  # what it said then that it was doing
        self.lost: dict[str, str] = {}
        self.cuts = Cuts()
        self.lost_nodes: dict[str, float] = {}  # where they were, and how long a raylet must be seen there
        self.finished: set[int] = set()
        self.broken: dict[str, tuple[float, str]] = {}  # whose exchange broke, when and how; a death explains it soon
        self.generation = 0
        self.turned_at: float | None = None  # when `events` last went round; None: nobody listens
        self.group: PlacementGroup | None = None
        self.seats: list[Seat] = []  # each rank's
        self.stop_asked, self.owns_ray = False, False
        self.is_recovering = False
        self.stop_told_at: float | None = None
        self.was_silent = False  # a process gave no answer: its peers may not know that it is gone
        self.start_weights: Mapping[str, Array] | None = None
        self.kills_before = out_of_memory_kills()
        self.quiet = contextlib.ExitStack()

    # ------------------------------------------------------------------------------------------------------- starting
    def build(self, start_weights: Mapping[str, Array] | None) -> Description:
        """Connect to Ray, place the processes and build the task in each."""
        self.quiet.enter_context(diverted_output(Path(self.directory) / "logs" / "ray.log"))
        resources = self.job.resources
        needed = resources.workers * resources.cpus_per_worker
        self.owns_ray = connect(self.address, needed, self.job.limits.start_s)
        self.start_weights = start_weights
        self._take_seats()
        self.transport = choose(self.job, self._nodes())
        self._check_injections()
        self._start_servers()
        for rank in range(self.size):
            self.workers[rank] = self._worker(rank)
        with self._starting():
            self._build_workers(list(range(self.size)))
            self._check_shared_memory()
            self._check_directory()
        self.built_weights = self.workers[0].start_weights.remote() if self.servers else None
        return self._description()

    def _take_seats(self) -> None:
        """Reserve a place for each worker."""
        outlook = check_resources(self.job, self.owns_ray)
        self.group = self.given_place or place(self.job, outlook, lambda text: self.say(text))
        self.seats = seats_of(self.group)

    def _description(self) -> Description:
        facts = self.facts[0]
        self.layout = Layout.from_json(facts["layout"])
        return Description(self.layout, facts["frozen"], *self.whereabouts())

    def whereabouts(self) -> tuple[str, list[str]]:
        """The transport, and why; the workers' hosts."""
        return str(self.transport), sorted({facts["host"] for facts in self.facts.values()})

    def take(self, job: JobSpec) -> Description:
        """Build another job in the same processes; its resources and strategy are as before."""
        self.job, self.job_json = job, job.model_dump_json(by_alias=True)
        with self._starting():
            calls = {f"rank {rank}": worker.take.remote(self.job_json) for rank, worker in self.workers.items()}
            calls |= {f"server {index}": server.take.remote(self.job_json) for index, server in self.servers.items()}
            self._ask(calls, "another job to be taken")
            self._build_workers(list(range(self.size)))
        return self._description()

    def live(self, paths: Sequence[str]) -> dict[str, Any]:
        """Rank 0's."""
        with self._starting():
            values: dict[str, Any] = self._ask({"rank 0": self.workers[0].live.remote(paths)}, "its values")[0]
        return values

    def plan_facts(self) -> dict[str, Any]:
        """Rank 0's."""
        with self._starting():
            facts: dict[str, Any] = self._ask({"rank 0": self.workers[0].plan_facts.remote()}, "what it needs")[0]
        return facts

    def _check_injections(self) -> None:
        """Refuse what would never happen: servers that fail where there are none."""
        aimed = next((text for text in self.injections if Injection.parse(text).role == "server"), None)
        if aimed is not None and self.transport.name != "object_store":
            raise UsageError(f"--inject {aimed}: there are no servers with transport {self.transport}; "
                             "add --set transport=object_store")  # fmt: skip

    def _nodes(self) -> list[str]:
        """The node of each rank's bundle."""
        return nodes_of(self.seats)

    def _start_servers(self) -> None:
        if self.transport.name == "object_store":
            assert isinstance(self.job.strategy, ParameterServerSpec)
            self.num_servers = self.job.strategy.servers
        self._replace_servers()

    def _replace_servers(self) -> None:
        for index in range(self.num_servers):
            if index not in self.servers:
                self.servers[index] = self._server(index)

    def _check_shared_memory(self) -> None:
        """Take another transport where a host's shared memory is too small."""
        if self.transport.name != "shared_memory":
            return
        for facts in (self.facts[ranks[0]] for ranks in self.transport.hosts):
            needed, free = facts["regions"][False].num_bytes, facts["shared_bytes_free"]
            if needed > free:
                lack = f"{lacking(needed, free)} on {facts['host']}"
                self._change_transport(lack)
                return
        if self.facts[0]["too_large"] is not None:
            self._change_transport(self.facts[0]["too_large"])
            return
        self.keeps = self._keeps_here()

    def _check_directory(self) -> None:
        """Where ranks write and read checkpoints, all must see the run directory.

        Raises:
            UsageError: one does not; with its host.
        """
        if not self.job.strategy.keeps_parts:
            return
        with Probe(Path(self.directory) / "checkpoints") as probe:
            calls = {f"rank {rank}": worker.answer_probe.remote(probe.token) for rank, worker in self.workers.items()}
            answers = dict(zip(self.workers, self._ask(calls, "its look at the run directory"), strict=True))
            for rank, problem in answers.items():
                problem = problem or probe.missing(rank)
                if problem is not None:
                    raise UsageError(
                        f"rank {rank} on {self.facts[rank]['host']} does not see the run directory {self.directory} "
                        f"({problem}); strategy {self.job.strategy.label} writes its checkpoints from every rank: "
                        "use --out with a folder that all hosts share, or storage: with its path (a bucket has copies)"
                    )

    def _change_transport(self, lack: str) -> None:
        self.transport = fall_back(self.job, self.transport, lack)
        self._start_servers()
        self._build_workers(list(range(self.size)))

    def _keeps_here(self) -> bool:
        """Whether states for a recovery can stay in the segment: the driver sees it, and it is worth it.

        Small ones are better handed over: there is always a newer one on the way.
        """
        here = ray.get_runtime_context().get_node_id()
        facts = next((facts for facts in self.facts.values() if facts["node"] == here), None)
        if facts is None:
            return False
        more = facts["regions"][True].num_bytes - facts["regions"][False].num_bytes
        firsts = [self.facts[ranks[0]] for ranks in self.transport.hosts]
        fits = all(one["regions"][True].num_bytes <= one["shared_bytes_free"] for one in firsts)
        return bool(more >= KEEP_FROM_BYTES and fits)

    def _worker(self, rank: int) -> Any:
        seat = self.seats[rank]
        place = PlacementGroupSchedulingStrategy(seat.group, placement_group_bundle_index=seat.bundle)
        resources = self.job.resources
        worker: Any = WorkerActor
        options = worker.options(
            num_cpus=resources.cpus_per_worker, num_gpus=resources.gpus_per_worker, scheduling_strategy=place
        )
        return options.remote(rank, self.job_json, self.directory, self.snapshot_every, self.injections)

    def _server(self, index: int) -> Any:
        server: Any = ServerActor
        node = server_node(self.job, self._nodes(), index)
        # Not soft, which Ray takes for no wish where no CPU is reserved. A node that has just left is a lost server.
        there = NodeAffinitySchedulingStrategy(node, soft=False)
        return server.options(scheduling_strategy=there).remote(index, self.job_json, self.directory, self.injections)

    def _build_workers(self, ranks: list[int]) -> None:
        files = self.sources.files
        weights = ray.put(dict(self.start_weights)) if self.start_weights is not None else None
        hosts = self.transport.hosts if self.transport.name == "shared_memory" else None
        calls = {f"rank {r}": self.workers[r].build.remote(self.sources.directory, files, weights, hosts)
                 for r in ranks}  # fmt: skip
        for rank, facts in zip(ranks, self._ask(calls, "the task to be built"), strict=True):
            if "error" in facts:
                raise UsageError(facts["error"])
            self.facts[rank] = facts
            self.places[f"rank {rank}"] = facts["node"], facts["pid"]
        if len({facts["fingerprint"] for facts in self.facts.values()}) > 1:
            raise UsageError(DIFFERENT_MODELS)
        self.heard |= {f"rank {rank}": time.monotonic() for rank in ranks}

    def _ask(self, calls: Mapping[str, Any], awaited: str) -> list[Any]:
        """Every role's answer, within `limits.start_s`; one that died is noticed while others wait for it.

        Raises:
            ProcessLostError: a process died, or lost the peer that it needed for its answer.
            UsageError: no answer in time; or the run was asked to end in a recovery.
        """
        limit = self.job.limits.start_s
        deadline = time.monotonic() + limit
        pending, answers = {call: role for role, call in calls.items()}, {}
        while pending:
            left = max(0.0, deadline - time.monotonic())
            ready, _ = ray.wait(list(pending), num_returns=1, timeout=min(left, POLL_S))
            self._check_not_over(awaited)
            if not ready and left > POLL_S:
                continue
            if not ready:
                role = next(iter(pending.values()))
                raise UsageError(
                    f"waited {limit:g} s for {role}, for {awaited}; see {self.directory}/logs, or raise limits.start_s"
                )
            role = pending.pop(ready[0])
            answers[role] = self._answer(role, ready[0], awaited)
        return [answers[role] for role in calls]

    def _check_not_over(self, awaited: str) -> None:
        """End a recovery's wait when the run is asked to end: what it goes back to has been committed."""
        if self.is_recovering and self.stop_asked:
            raise UsageError(f"asked to end while it waited for {awaited}")

    def _answer(self, role: str, call: Any, awaited: str) -> Any:
        """What a call has come to."""
        try:
            return ray.get(call)
        except ray.exceptions.RayActorError as error:
            raise ProcessLostError(role, self._cause(error), awaited) from None
        except PeerLost as error:
            cause = " ".join(str(getattr(error, "cause", error)).split())[-200:]
            raise ProcessLostError(self._who_died() or role, cause, awaited) from None
        except ray.exceptions.RayTaskError as error:
            raise error.cause from None

    def _who_died(self) -> str | None:
        """The first process that no longer exists, where another one has missed it."""
        actors = {f"rank {rank}": worker for rank, worker in self.workers.items()} | {
            f"server {index}": server for index, server in self.servers.items()
        }
        pings = {role: actor.ping.remote() for role, actor in actors.items()}
        ray.wait(list(pings.values()), num_returns=len(pings), timeout=self.job.limits.heartbeat_s)
        for role, ping in pings.items():
            try:
                ray.get(ping, timeout=0)
            except ray.exceptions.RayActorError:
                return role
            except ray.exceptions.RayError:
                continue
        return None

    @contextlib.contextmanager
    def _starting(self) -> Iterator[None]:
        """A death before training has begun ends the run: there is nothing to go back to, and it would come again."""
        try:
            yield
        except ProcessLostError as lost:
            raise RunError(f"{lost.cause} (while waiting for {lost.awaited})", role=lost.role, phase="start") from None

    # ------------------------------------------------------------------------------------------------------ connecting
    def begin(self, cut: Cut | None, until: int | None = None) -> None:
        """Connect everyone and load `cut`, then let the workers train."""
        self.until = until
        with self._starting():
            self._begin(cut)

    def load(self, cut: Cut | None, until: int | None = None) -> None:
        """Connect everyone and load `cut`."""
        self.until = until
        with self._starting():
            self._load(cut)

    def _begin(self, cut: Cut | None) -> None:
        self._load(cut)
        for rank in self.workers:
            self._start(rank)

    def _load(self, cut: Cut | None) -> None:
        self.generation += 1
        if self.servers:
            self._load_servers(cut)
        self._connect(list(range(self.size)))
        shared = ray.put(self._worker_share(cut)) if cut is not None else None
        own = cut.own if cut is not None else {}
        calls = {f"rank {rank}": w.load.remote(shared, own.get(rank)) for rank, w in self.workers.items()}
        self._ask(calls, "the state to be loaded")
        self.finished = set()

    def _worker_share(self, cut: Cut) -> dict[str, Any]:
        """What workers need of the shared half: moments stay with the servers where there are some."""
        return {**cut.shared, "moments": {}} if self.servers else cut.shared

    def _load_servers(self, cut: Cut | None) -> None:
        facts, handles = self.facts[0], [self.servers[index] for index in sorted(self.servers)]
        plan = (facts["layout"], {**facts["agenda"], "until": self.until}, facts["phases"], handles)
        places = self._ask({f"server {i}": s.build.remote(*plan) for i, s in enumerate(handles)}, "its start")
        self.places |= {f"server {index}": place for index, place in enumerate(places)}
        if cut is not None:
            weights, moments, clock = cut.shared["weights"], cut.shared["moments"], cut.shared["clock"]
            state: tuple[Any, ...] = (ray.put(weights), ray.put(moments), clock)
        else:
            state = (self.built_weights, {}, None)
        ranks = list(range(self.size))
        self._ask({f"server {i}": s.load.remote(*state, ranks) for i, s in enumerate(handles)}, "its state")
        self.heard |= {f"server {index}": time.monotonic() for index in self.servers}

    def _connect(self, ranks: list[int], segment: tuple[int, int] | None = None) -> None:
        """Let these workers reach the others; through an open `segment`, if they join others who are at work."""
        host, port = None, 0
        shares, hosts = self.transport.name == "shared_memory", self.transport.hosts
        if self.transport.name == "process_group" or (shares and len(hosts) > 1):
            host = "127.0.0.1" if len(hosts) == 1 else self.facts[0]["address"]
            port = self._ask({"rank 0": self.workers[0].open_rendezvous.remote(host)}, "the rendezvous")[0]
        handles = [self.servers[index] for index in sorted(self.servers)]
        ways = dict.fromkeys(ranks, Way(host, port, handles, self.generation, token=secrets.token_hex(4),
                                        until=self.until))  # fmt: skip
        if shares:
            found = self._segments() if segment is None else [(hosts[0], segment)]
            ways = {rank: replace(way, segment=one, pids=[self.facts[r]["pid"] for r in neighbours],
                                  rejoins=segment is not None, keeps=self.keeps)
                    for neighbours, one in found for rank, way in ways.items() if rank in neighbours}  # fmt: skip
        self._ask({f"rank {rank}": self.workers[rank].connect.remote(way) for rank, way in ways.items()},
                  "its connection")  # fmt: skip

    def _segments(self) -> list[tuple[tuple[int, ...], tuple[int, int]]]:
        """The ranks of each host, and where its new segment is."""
        hosts = self.transport.hosts
        calls = {f"rank {ranks[0]}": self.workers[ranks[0]].open_segment.remote(self.keeps) for ranks in hosts}
        found = list(zip(hosts, self._ask(calls, "its shared memory"), strict=True))
        self._map_segment(found)
        return found

    def _map_segment(self, found: list[tuple[tuple[int, ...], tuple[int, int]]]) -> None:
        """Let the driver have the kept states of its own host too."""
        if self.segment is not None:
            self.segment.close()
            self.segment = None
        here = ray.get_runtime_context().get_node_id()
        for ranks, (pid, descriptor) in found:
            facts = self.facts[ranks[0]]
            if self.keeps and facts["node"] == here:
                with contextlib.suppress(PeerLost):  # it has just died; the run goes on without
                    self.segment = Segment.open(pid, descriptor, facts["regions"][True])

    def _start(self, rank: int) -> None:
        self.streams[rank] = self.workers[rank].advance.options(num_returns="streaming").remote()
        self.heard[f"rank {rank}"] = time.monotonic()
        self.broken.pop(f"rank {rank}", None)

    # -------------------------------------------------------------------------------------------------------- training
    def events(self) -> Iterator[Event | Lost]:
        """Events of all workers as they come; deaths as `Lost`. Ends when every worker has finished."""
        try:
            yield from self._events()
        finally:
            self.turned_at = None

    def _events(self) -> Iterator[Event | Lost]:
        while len(self.finished) < self.size:
            self.turned_at = time.monotonic()
            ready: list[Any] = []
            if self.streams:
                streams = list(self.streams.values())
                ray.wait(streams, num_returns=1, timeout=POLL_S)
                ready, _ = ray.wait(streams, num_returns=len(streams), timeout=0)  # nobody's events fall behind
            else:
                time.sleep(POLL_S)
            for rank in [rank for rank, stream in self.streams.items() if stream in ready]:
                event = self._next(rank)
                if event is not None:
                    yield event
            self._heartbeat()
            if self.stop_asked and self._stopping():
                return
            self._look_around()
            while (
                self.lost and not self.stop_asked
            ):  # `recover` clears it, and fills it anew when somebody dies meanwhile
                role, cause = next(iter(self.lost.items()))
                yield Lost(role, cause, self.phases.get(role, "start"))

    def _look_around(self) -> None:
        """What a group does besides, every now and then."""

    def _stopping(self) -> bool:
        """Pass a request to stop on; True when waiting for the workers is over: some are gone, or it takes too long.

        Ray and most schedulers end a job a few seconds after their first signal: the newest cut is then worth more
        than a newer one that does not get written.
        """
        if self.stop_told_at is None:
            self.stop_told_at = time.monotonic()
            for worker in self.workers.values():
                worker.request_stop.remote()
        return bool(self.lost) or time.monotonic() - self.stop_told_at > self._stop_patience_s

    @property
    def _stop_patience_s(self) -> float:
        """Where the ranks write checkpoints, there is no other one in memory for which the time would be needed."""
        return self.job.limits.lost_after_s if self.job.strategy.keeps_parts else STOP_PATIENCE_S

    def _next(self, rank: int) -> Event | None:
        """The next event of a worker's stream; the end of the stream or the worker gives None."""
        role = f"rank {rank}"
        try:
            event = cast(Event, ray.get(next(self.streams[rank]), timeout=self.job.limits.lost_after_s))
        except StopIteration:
            del self.streams[rank]
            if rank not in self.finished and role not in self.broken:  # nobody else would ever miss it
                self._mark_lost(role, "its events ended before it had finished")
            return None
        except ray.exceptions.RayActorError as error:
            self._mark_lost(role, self._cause(error))
            return None
        except ray.exceptions.GetTimeoutError:
            self._mark_lost(role, f"an event of it did not arrive for {self.job.limits.lost_after_s:g} s")
            return None
        self.heard[f"rank {rank}"] = time.monotonic()
        if isinstance(event, Finished):
            self.finished.add(rank)
        if isinstance(event, Failed):
            self.streams.pop(rank, None)
        if isinstance(event, Interrupted):
            self.broken[f"rank {rank}"] = time.monotonic(), event.message
            return None
        return event

    def _heartbeat(self) -> None:
        """Ping each process; who has given no answer for too long, or blocks in its own work, is ended."""
        limits, now = self.job.limits, time.monotonic()
        processes = {f"rank {r}": w for r, w in self.workers.items()} | {
            f"server {i}": s for i, s in self.servers.items()
        }
        for role, actor in processes.items():
            if role in self.lost:
                continue
            ping = self.pings.get(role)
            if ping is None:
                if now - self.asked.get(role, 0.0) >= limits.heartbeat_s:  # however much it tells: a death has a phase
                    self.pings[role] = (actor.ping.remote(), now)
                    self.asked[role] = now
                continue
            if ray.wait([ping[0]], timeout=0)[0]:
                del self.pings[role]
                try:
                    activity, motionless_s = ray.get(ping[0])
                    self.heard[role], self.phases[role] = now, activity
                    if motionless_s > patience_s(self.job):
                        self._end(role)
                        self._mark_lost(role, blocked_cause(self.job, activity, motionless_s))
                except ray.exceptions.RayActorError as error:
                    self._mark_lost(role, self._cause(error))
                except Exception as error:  # an exchange that failed where nobody waits for its result
                    self._end(role)
                    self._mark_lost(role, " ".join(str(error).split())[-300:])
            elif self._is_silent(role, max(ping[1], self.heard.get(role, 0.0)), now):
                self.was_silent = True
                self._end(role)
                self._mark_lost(
                    role, f"it gave no answer for {limits.lost_after_s:g} s (stopped or cut off) and was ended"
                )

        for role, (since, message) in list(self.broken.items()):
            if not self.lost and now - since > limits.lost_after_s:  # broken, and nobody has died of it
                self._mark_lost(role, message)

    def _is_silent(self, role: str, since: float, now: float) -> bool:
        """Whether nothing was heard of a process for too long; one that was cut off has longer."""
        node, patience_s = self.places.get(role, ("", 0))[0], self.job.limits.lost_after_s
        return not self.cuts.excuses(role, node, since, now, patience_s)

    def _mark_lost(self, role: str, cause: str) -> None:
        kind, index = role.split()
        node = self._node_of(role)
        self.broken.pop(role, None)
        actor = self._living(role).pop(int(index), None)
        if actor is not None:
            ray.kill(actor, no_restart=True)  # unreachable is not always dead
        if kind == "rank":
            self.streams.pop(int(index), None)
            if int(index) in self.finished and not self._needs_everyone:
                return  # it had nothing left to do
        self.pings.pop(role, None)
        self.lost[role] = cause
        self.places.pop(role, None)
        if node:
            self.lost_nodes[node] = UNSAID_S if cause == CONNECTION_BROKE else 0.0

    def _node_of(self, role: str) -> str:
        """Where a process is, or was to be: it may die before it has said so; "" where that is not known."""
        if role in self.places:
            return self.places[role][0]
        kind, index = role.split()
        if kind != "rank" or int(index) not in self.workers:
            return ""
        return nodes_of([self.seats[int(index)]])[0]

    @property
    def _needs_everyone(self) -> bool:
        return self.job.strategy.is_synchronous

    def _end(self, role: str) -> None:
        """SIGKILL the process of `role`, on whatever node it runs."""
        if role in self.places:
            kill(*self.places[role], timeout_s=self.job.limits.heartbeat_s + 5.0)
        actor = self._living(role).get(int(role.split()[1]))
        if actor is not None:
            ray.kill(actor, no_restart=True)

    def _cause(self, error: Exception) -> str:
        """Why a process died, in one line."""
        before, self.kills_before = self.kills_before, out_of_memory_kills()
        return cause_of_death(error, kernel_killed=self.kills_before > before)

    # -------------------------------------------------------------------------------------------------------- recovery
    def recover(self, cut: Cut | None) -> bool:
        """Replace what is lost; async workers rejoin, everything else goes back to `cut`.

        Whoever dies meanwhile is the next `Lost`: the one who consumes `events` counts it, and calls again.
        """
        roles, self.lost = list(self.lost), {}
        self.phases = {role: phase for role, phase in self.phases.items() if role not in roles}
        self.injections = without_spent(self.injections, roles)
        only_workers = all(role.startswith("rank") for role in roles)
        went_back = False
        try:
            with self._recovering(roles):
                self._wait_for_verdict()  # else Ray would place the new ones on a node that has gone
                self._wait_for_place()
                moved = self._has_moved()
                if only_workers and not self._needs_everyone and not moved and self._all_rejoin(roles, cut):
                    return False
                went_back = True
                self._go_back(cut, moved)
        except ProcessLostError as again:
            for role in roles:
                if role != again.role and int(role.split()[1]) not in self._living(role):
                    self.lost[role] = "it could not be replaced yet"
            self._mark_lost(again.role, again.cause)
            self.lost.setdefault(again.role, again.cause)
        return went_back

    @contextlib.contextmanager
    def _recovering(self, roles: list[str]) -> Iterator[None]:
        """Inside, no wait outlasts a request to end; these roles are then lost for good."""
        self.is_recovering = True
        try:
            yield
        except UsageError:
            if not self.stop_asked:
                raise
            self.lost |= dict.fromkeys(roles, "it was not replaced: the run was asked to end")
        finally:
            self.is_recovering = False

    def _wait_for_verdict(self) -> None:
        """Until it is known whether the nodes of those that were lost live."""
        nodes, self.lost_nodes = self.lost_nodes, {}
        wait_for_verdict(nodes, self.job.limits.start_s, lambda: self.stop_asked)

    def _has_moved(self) -> bool:
        """Whether Ray's other place for one that was lost changes who shares a host with whom, where that matters."""
        matters = self.transport.name in ("shared_memory", "process_group")
        return matters and by_host(self._nodes()) != self.transport.hosts

    def _wait_for_place(self) -> None:
        """Until those that were lost with their node have another one."""
        if self.group is not None and self.given_place is None:
            wait_for_place(self.group, self.job, lambda text: self.say(text), lambda: self.stop_asked)

    def _all_rejoin(self, roles: list[str], cut: Cut | None) -> bool:
        rejoined = [self._rejoin(int(role.split()[1]), cut) for role in roles]
        return all(rejoined)

    def _living(self, role: str) -> dict[int, Any]:
        return self.workers if role.startswith("rank") else self.servers

    def _go_back(self, cut: Cut | None, moved: bool = False) -> None:
        """Everyone continues from `cut`; without one, from the beginning.

        Args:
            moved: others share a host than before: the transport is chosen again, and all build anew.
        """
        if self.job.strategy.keeps_parts:
            self._end_all()
        else:
            self._stop_streams()
        self.injections = without_spent(self.injections, list(self.lost))
        self.lost, self.pings, self.broken = {}, {}, {}
        if moved:
            self._choose_again()
        self._replace_servers()
        missing = [rank for rank in range(self.size) if rank not in self.workers]
        for rank in missing:
            self.workers[rank] = self._worker(rank)
        anew = list(range(self.size)) if cut is None or moved else missing
        if anew:
            self._build_workers(anew)
            self._check_directory()
        if moved:
            self._check_shared_memory()
            self.built_weights = self.workers[0].start_weights.remote() if self.servers else None
        self._begin(cut)

    def _choose_again(self) -> None:
        """The way of the gradients between these nodes; servers that live go on, with the job of this size."""
        self.transport = choose(self.job, self._nodes())
        if self.transport.name != "shared_memory" and self.segment is not None:
            self.segment.close()
            self.segment = None
        self.keeps = False  # until it is known that there is room
        if self.transport.name != "object_store":
            for server in self.servers.values():
                ray.kill(server, no_restart=True)
            self.servers, self.num_servers = {}, 0
            return
        self._ask({f"server {index}": server.take.remote(self.job_json) for index, server in self.servers.items()},
                  "the job of another size to be taken")  # fmt: skip
        self._start_servers()

    def regroup(self, cut: Cut | None) -> None:
        """A group of a fixed size has no more room."""

    def _rejoin(self, rank: int, cut: Cut | None) -> bool:
        """Replace an asynchronous worker while the others go on; False if the run has ended, and it may be missed."""
        if self.transport.name == "shared_memory":
            return self._rejoin_host(rank, cut)
        ended, number = self._ask({"server 0": self.servers[0].leave.remote(rank)}, "a worker to be let go")[0]
        if ended:
            return False
        calls = {f"server {i}": s.discard.remote(rank, number) for i, s in self.servers.items()}
        self._ask(calls, "a worker's gradients to be dropped")
        self._begin_anew(rank, cut)
        return True

    def _begin_anew(self, rank: int, cut: Cut | None, segment: tuple[int, int] | None = None) -> None:
        self.workers[rank] = self._worker(rank)
        self._build_workers([rank])
        self.generation += 1
        self._connect([rank], segment)
        own = cut.own.get(rank) if cut is not None else None
        shared = self._worker_share(cut) if cut is not None else None
        self._ask({f"rank {rank}": self.workers[rank].load.remote(shared, own)}, "its state to be loaded")
        self._start(rank)

    def _rejoin_host(self, rank: int, cut: Cut | None) -> bool:
        """Replace a worker that was one of the servers in shared memory.

        False if that does not do: nobody is left who has the segment open, it is torn, or the run has ended there.
        """
        others = [other for other in self.workers if other != rank]
        if self.finished or not others:
            return False
        calls = {f"rank {others[0]}": self.workers[others[0]].shared_segment.remote()}
        segment = self._ask(calls, "the others' shared memory")[0]
        if segment is not None:
            self._begin_anew(rank, cut, segment)
        return segment is not None

    def _end_all(self) -> None:
        """End the survivors too: what their library keeps in a process does not outlive the loss of a peer."""
        for worker in self.workers.values():
            ray.kill(worker, no_restart=True)
        self.workers, self.streams = {}, {}

    def _stop_streams(self) -> None:
        """Survivors end their loops: a broken group or interrupted servers end their waits. Others are ended.

        One that waits in a collective for a process that has fallen silent hears of no broken connection: it is not
        waited for as long as one that may be in the midst of its step.
        """
        for server in self.servers.values():
            server.interrupt.remote()
        for worker in self.workers.values():
            worker.interrupt.remote(self.generation)
        limits = self.job.limits
        patience_s = min(SILENT_BEATS * limits.heartbeat_s, limits.lost_after_s) if self.was_silent else (
            limits.lost_after_s)  # fmt: skip
        self.was_silent, deadline = False, time.monotonic() + patience_s
        while self.streams and time.monotonic() < deadline:
            self._check_not_over("the others' exchange to break")
            ready, _ = ray.wait(list(self.streams.values()), num_returns=1, timeout=POLL_S)
            for rank in [rank for rank, stream in self.streams.items() if stream in ready]:
                self._next(rank)
        for rank in list(self.streams):
            self._end(f"rank {rank}")
            self._mark_lost(f"rank {rank}", "it did not leave a broken exchange")
        self.streams = {}

    # ---------------------------------------------------------------------------------------------------------- other
    def shared_state(self, version: int, carried: dict[str, Array]) -> dict[str, Any] | None:
        """The servers' captures of a version; None if a newer one has taken their place, or a server is gone."""
        if not self.servers:  # the workers hand it over themselves; this one was overwritten before
            return None
        calls = [self.servers[index].captured.remote(version) for index in sorted(self.servers)]
        try:
            pieces = ray.get(calls, timeout=self.job.limits.lost_after_s)
        except (ray.exceptions.RayActorError, ray.exceptions.GetTimeoutError):
            return None
        if len(pieces) < self.num_servers or any(piece is None for piece in pieces):
            return None
        return join_captures(pieces, carried)

    def kept(self, version: int) -> dict[str, Array] | None:
        """From the segment, which the driver has mapped too."""
        return read_kept(self.segment, version) if self.segment is not None else None

    @property
    def activity(self) -> tuple[str, float]:
        """Whether `events` goes round: workers are watched there."""
        return "train", 0.0 if self.turned_at is None else time.monotonic() - self.turned_at

    def request_stop(self) -> None:
        """Noticed by `events` (a signal handler must not call Ray)."""
        self.stop_asked = True

    def evaluate(self, split: str, saved: Mapping[str, Any]) -> dict[str, tuple[float, float]]:
        """In one part per worker, added up; the part of a worker that dies is given to another.

        Where each keeps a part of the model, all are needed.
        """
        state = ray.put(dict(saved))
        calls = {part: self._evaluate_part(split, part, state, part) for part in range(self.size)}
        answers: dict[int, dict[str, Any]] = {}
        while calls:
            ready, _ = ray.wait([call for _, call in calls.values()], num_returns=1, timeout=POLL_S)
            self._heartbeat()
            for role in self.lost if self.job.strategy.keeps_parts else ():
                raise RunError(self.lost[role], role=role, phase=f"evaluate {split}")
            for part, (rank, call) in list(calls.items()):
                if call in ready and rank in self.workers:
                    try:
                        answers[part] = ray.get(call)
                        del calls[part]
                    except ray.exceptions.RayActorError as error:
                        self._mark_lost(f"rank {rank}", self._cause(error))
                if part in calls and rank not in self.workers:
                    calls[part] = self._evaluate_part(split, part, state, part)
        sums: dict[str, tuple[float, float]] = {}
        for part, answer in sorted(answers.items()):
            if "error" in answer:
                raise RunError(answer["error"], role=f"rank {part}", phase=f"evaluate {split}")
            for name, (total, count) in answer["means"].items():
                before = sums.get(name, (0.0, 0.0))
                sums[name] = before[0] + total, before[1] + count
        return sums

    def _evaluate_part(self, split: str, part: int, state: Any, wanted: int) -> tuple[int, Any]:
        """(rank, call) of the worker that evaluates a part: the wanted one if it lives."""
        if not self.workers:
            raise RunError(f"no worker is left for the {split} split", role=f"rank {wanted}", phase=f"evaluate {split}")
        rank = wanted if wanted in self.workers else min(self.workers)
        return rank, self.workers[rank].evaluate_part.remote(split, part, self.size, state)

    def close(self) -> None:
        """End actors, placement group, and a Ray of our own; does not wait for a Ray that no longer answers."""
        if not ray.is_initialized():
            self.quiet.close()
            return
        close_within(self._close, CLOSE_PATIENCE_S)
        self.quiet.close()

    def _close(self) -> None:
        for actor in [*self.workers.values(), *self.servers.values()]:
            ray.kill(actor, no_restart=True)
        self._leave_seats()
        if self.owns_ray:
            ray.shutdown()

    def _leave_seats(self) -> None:
        if self.group is not None and self.given_place is None:
            remove_placement_group(self.group)


def kill(node: str, pid: int, timeout_s: float) -> None:
    """SIGKILL a process on whatever node it runs."""
    there = NodeAffinitySchedulingStrategy(node, soft=False)
    killer = ray.remote(num_cpus=0)(end_process).options(scheduling_strategy=there)
    ray.wait([killer.remote(pid)], timeout=timeout_s)


def without_spent(injections: tuple[str, ...], roles: list[str]) -> tuple[str, ...]:
    """The injections that are still to come: each process that was lost has spent its earliest kill or stop."""
    left = list(injections)
    for role in roles:
        own = [text for text in left if Injection.parse(text).ends(role)]
        if own:
            left.remove(min(own, key=lambda text: Injection.parse(text).step))
    return tuple(left)
