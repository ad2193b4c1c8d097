"""Members on Ray: a host (`population/host.py`) with one actor per slot, which holds one member after the other.

`RayHost` is the one class that owns slots' actors. Its consumer decides about members: it gives commands, which are
actor calls that a slot's process carries out one after the other (`slot.py`), and waits for answers. Every wait has a
limit: a slot must have a place within `limits.start_s` (`slot_places.py`), then its process must be there within
the same, and then its member be built; each process is pinged every `heartbeat_s`, and one that gives no
answer for `lost_after_s` is ended (SIGKILL, so that a stopped one goes too), as is one that blocks in its own work ten
times as long. Its member is then `Gone`, and the slot's next member has a new process. A private Ray ends with the
host. No torch here.
"""

from __future__ import annotations

import contextlib
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from distml.errors import UsageError
from distml.exchange.layout import Array
from distml.memory import out_of_memory_kills
from distml.population.host import Advanced, Answer, Copied, Gone, Handle, Ready
from distml.runtime.actors import blocked_cause, patience_s
from distml.runtime.connection import connect, diverted_output
from distml.runtime.cut import Cut
from distml.runtime.deaths import cause_of_death
from distml.runtime.endings import close_within
from distml.runtime.kept import Left
from distml.runtime.placement import Outlook, check_resources
from distml.runtime.planning import request_of
from distml.runtime.ray import kill
from distml.runtime.slot_places import SlotPlaces
from distml.spec.schema import JobSpec
from distml.tasks.sources import SourceTree

Injections = Mapping[str, tuple[str, ...]]
POLL_S = 0.2
CLOSE_PATIENCE_S = 5.0


class Kept:
    """A handle: a state in the process where a member has left it, or in the object store.

    Args:
        actor: the process, and `found` where the state is in it.
        node: of the process.
        reference: in the object store.
        dropped: where its number goes when nobody refers to this any more; whoever talks to the process passes it on.
    """

    def __init__(
        self, actor: Any, found: Left | None, node: str | None, reference: Any, dropped: deque[int] | None
    ) -> None:
        self._actor, self._found, self._node, self._reference = actor, found, node, reference
        self._lock = threading.Lock()
        if dropped is not None and found is not None:  # not a call: this may run within any other one, on any thread
            weakref.finalize(self, dropped.append, found.token)

    def way_from(self, node: str | None) -> Any:
        """How a process on `node` gets it: directly from shared memory, where that is its host's."""
        with self._lock:
            direct = self._reference is None and self._found is not None and self._found.places is not None
        return self._found if direct and node is not None and node == self._node else self.reference()

    def reference(self) -> Any:
        """In the object store, where its process puts it now if it has not yet."""
        with self._lock:
            if self._reference is None:
                assert self._found is not None
                self._reference = self._actor.give.remote(self._found.token)
                self._actor = None
            return self._reference


@dataclass
class Slot:
    """One slot, and what is under way in it.

    Attributes:
        calls: of the member that is in it, in their order: what is awaited; the phase it is, and the handle of the
            state that it reads, whose memory must not be used again before.
        heard: when it last answered anything; None: its process has not begun.
        asked: when it was last pinged.
        started: since when its place, then its process, then its member is awaited; until that is built.
        dropped: numbers of states that its process may forget.
    """

    index: int
    actor: Any = None
    member: str | None = None
    calls: dict[Any, tuple[str, Handle]] = field(default_factory=dict)
    hello: Any = None
    process: tuple[str, int] | None = None
    heard: float | None = None
    asked: float = 0.0
    ping: Any = None
    started: float | None = None
    phase: str = "start"
    step: int | None = None
    dropped: deque[int] = field(default_factory=deque)
    kept: weakref.WeakSet[Kept] = field(default_factory=weakref.WeakSet)

    @property
    def node(self) -> str | None:
        """Of its process, once that is known."""
        return self.process[0] if self.process is not None else None

    def pass_on_dropped(self) -> None:
        """Tell its process which states nobody refers to any more."""
        if self.dropped:
            self.actor.drop.remote([self.dropped.popleft() for _ in range(len(self.dropped))])


class RayHost:
    """A Ray actor per slot, which holds one member after the other. Connects to Ray, or starts a private one.

    Args:
        base: what all members have in common: resources, limits.
        sources: the user's files.
        directory: where members have their folders; a member's is `directory / name`. Logs of the slots' processes are
            in `directory.parent / "logs"`.
        slots: members at the same time, as many as are wanted; on a running cluster there are at most as many as fit.
        address: of a running Ray cluster; None: RAY_ADDRESS, the surrounding job's, else a private Ray.
        injections: member -> failures to cause (`kill:rank=0,step=40`), until it is gone for the first time.
        start_weights: what `init` starts from.
        say: told what is waited for.

    Raises:
        UsageError: no cluster at the address, or not even one member fits or has a place within `limits.start_s`.
    """

    def __init__(
        self, base: JobSpec, sources: SourceTree, directory: Path, slots: int, address: str | None = None,
        injections: Injections | None = None, start_weights: Mapping[str, Array] | None = None,
        say: Callable[[str], None] = lambda text: None,
    ) -> None:  # fmt: skip
        self.base, self.sources, self.directory = base, sources, directory.resolve()
        self.injections = dict(injections or {})
        self.gone: set[str] = set()
        self.answers: list[Answer] = []
        self.kills_before = out_of_memory_kills()
        self.quiet = contextlib.ExitStack()
        self.quiet.enter_context(diverted_output(self.directory.parent / "logs" / "ray.log"))
        self.all_slots: list[Slot] = []
        resources = base.resources
        self.owns_ray = False
        self.places = SlotPlaces(base, Outlook(), say)
        try:
            each = resources.workers * resources.cpus_per_worker
            self.owns_ray = connect(address, slots * each, base.limits.start_s)
            self.places.outlook = check_resources(base, self.owns_ray)
            self.all_slots = [Slot(index) for index in range(self.places.take(slots))]
        except BaseException:
            self.close()
            raise
        self.start_weights = ray.put(dict(start_weights)) if start_weights is not None else None

    @property
    def slots(self) -> int:
        """Members at the same time: slots that have a place, or somebody who waits there for one."""
        return max(1, sum(slot.member is not None or self._is_placed(slot) for slot in self.all_slots))

    def _is_placed(self, slot: Slot) -> bool:
        return slot.index in self.places.placed

    @property
    def hosts(self) -> Sequence[str]:
        """Names of the cluster's machines."""
        return sorted({str(node["NodeManagerHostname"]) for node in ray.nodes() if node["Alive"]})

    # ------------------------------------------------------------------------------------------------------- commands
    def start(self, member: str, job: JobSpec, state: Handle | None = None, watch: Sequence[str] = ()) -> None:
        """Build a member in a free slot; one with a place comes first, of them one whose process is there."""
        free = sorted((slot for slot in self.all_slots if slot.member is None),
                      key=lambda slot: (not self._is_placed(slot), slot.actor is None, slot.index))  # fmt: skip
        if not free:
            raise RuntimeError(f"no free slot for member {member}: {len(self.all_slots)} are taken")
        slot = free[0]
        if slot.actor is None:
            self._launch(slot)
        self.gone.discard(member)
        slot.member, slot.calls, slot.step, slot.started = member, {}, None, time.monotonic()
        slot.phase, slot.ping = "start", None  # what the one before it was doing says nothing of this one
        known = [state.way_from(slot.node)] if state is not None else []
        job_json, injections = job.model_dump_json(by_alias=True), self.injections.get(member, ())
        slot.calls[slot.actor.start.remote(member, job_json, known, list(watch), injections)] = "start", state

    def advance(self, member: str, until: int | None, keep: bool) -> None:
        """Train a member."""
        slot = self._slot_of(member)
        if slot is not None:
            slot.pass_on_dropped()
            slot.calls[slot.actor.advance.remote(member, until, keep)] = "train", None

    def copy(self, member: str, state: Handle, job: JobSpec, keep: bool = False) -> None:
        """Let a member take a state's shared half, then a job's values."""
        slot = self._slot_of(member)
        if slot is not None:
            job_json = job.model_dump_json(by_alias=True)
            slot.pass_on_dropped()
            way = state.way_from(slot.node)
            slot.calls[slot.actor.copy.remote(member, [way], job_json, keep)] = "copy", state

    def _slot_of(self, member: str) -> Slot | None:
        """Where a member is; None: it is gone, which is said or about to be."""
        slot = next((slot for slot in self.all_slots if slot.member == member), None)
        if slot is None and member not in self.gone:
            raise KeyError(f"there is no member {member}")
        return slot

    def release(self, member: str) -> None:
        """End a member; what it kept goes into the object store, for its process may end before its handles do."""
        slot = next((slot for slot in self.all_slots if slot.member == member), None)
        if slot is None:
            return
        for kept in list(slot.kept):
            kept.reference()
        slot.pass_on_dropped()
        slot.actor.release.remote()
        slot.member, slot.calls, slot.started = None, {}, None

    def fetch(self, state: Handle) -> Cut:
        """A state, here; its arrays are for reading."""
        try:
            cut: Cut = ray.get(state.reference(), timeout=patience_s(self.base))
        except ray.exceptions.RayError as error:
            raise LookupError(f"a member's state was lost with its process ({type(error).__name__})") from error
        return cut

    def put(self, state: Cut) -> Handle:
        """Into the object store."""
        return Kept(None, None, None, ray.put(state), None)

    # -------------------------------------------------------------------------------------------------------- waiting
    def wait(self, timeout_s: float) -> list[Answer]:
        """What has happened."""
        deadline = time.monotonic() + timeout_s
        while not self.answers:
            left = deadline - time.monotonic()
            self._listen(min(POLL_S, max(0.0, left)))
            came = self.places.look()
            for slot in self.all_slots:
                if slot.index in came and slot.started is not None:
                    slot.started = time.monotonic()
                if slot.actor is not None:
                    self._look_at(slot)
            if left <= 0:
                break
        found, self.answers = self.answers, []
        return found

    def _listen(self, patience_s: float) -> None:
        """Wait for the next answer, and take all that are there."""
        awaited = [call for slot in self.all_slots for call in slot.calls]
        if not awaited:
            time.sleep(patience_s)
        elif ray.wait(awaited, num_returns=1, timeout=patience_s)[0]:
            ready, _ = ray.wait(awaited, num_returns=len(awaited), timeout=0)
            for slot in self.all_slots:
                for call in [call for call in slot.calls if call in ready]:
                    self._take(slot, call)

    def _take(self, slot: Slot, call: Any) -> None:
        """The answer to one of a slot's calls, unless that went with its member."""
        if call not in slot.calls:
            return
        phase = slot.calls[call][0]
        try:
            answer: Answer = ray.get(call)
        except ray.exceptions.RayTaskError as error:  # a defect: nothing that a member does raises
            raise RuntimeError(f"slot {slot.index} failed in {phase}: {error}") from error
        except ray.exceptions.RayError as error:
            self._lose(slot, self._cause(error), phase)
            return
        del slot.calls[call]
        slot.heard = time.monotonic()
        self.answers.append(self._taken(slot, answer))

    def _taken(self, slot: Slot, answer: Answer) -> Answer:
        """An answer, with a handle for the state that was left in the slot's process."""
        if isinstance(answer, Ready):
            slot.started = None
        if isinstance(answer, Gone):
            self._empty(slot)
            self.gone.add(answer.member)
            self.injections.pop(answer.member, None)
        if isinstance(answer, Advanced):
            slot.step = answer.step
        if isinstance(answer, (Advanced, Copied)) and answer.state is not None:
            kept = Kept(slot.actor, answer.state, slot.node, None, slot.dropped)
            slot.kept.add(kept)
            return replace(answer, state=kept)
        return answer

    def _look_at(self, slot: Slot) -> None:
        """Ping a slot's process; end one that is silent, blocks, or takes too long to start."""
        limits, now = self.base.limits, time.monotonic()
        if slot.started is not None and now - slot.started > limits.start_s:
            self._end_start(slot)
        elif slot.process is None or slot.heard is None:
            self._hear_hello(slot)
        elif slot.ping is None:
            if now - slot.asked >= limits.heartbeat_s:
                slot.ping, slot.asked = slot.actor.ping.remote(), now
        elif ray.wait([slot.ping], timeout=0)[0]:
            self._hear_ping(slot)
        elif now - max(slot.asked, slot.heard) > limits.lost_after_s:
            self._end(slot, f"it gave no answer for {limits.lost_after_s:g} s (stopped or cut off) and was ended")

    def _end_start(self, slot: Slot) -> None:
        """A start has taken too long.

        Raises:
            UsageError: no slot at all has a place any more.
        """
        limit = f"{self.base.limits.start_s:g} s"
        if slot.process is not None:
            cause = f"it was not built within {limit}; see logs/slot-{slot.index}.log, or raise limits.start_s"
        elif self._is_placed(slot):
            cause = f"its process was not there within {limit}; raise limits.start_s"
        else:
            cause = (f"after {limit} still no place for {request_of(self.base)}; {self.places.situation()}; raise "
                     "limits.start_s to wait longer")  # fmt: skip
            if not self.places.placed:
                raise UsageError(cause)
        self._end(slot, cause)

    def _hear_hello(self, slot: Slot) -> None:
        if not ray.wait([slot.hello], timeout=0)[0]:
            return
        try:
            node, pid, _ = ray.get(slot.hello)
        except ray.exceptions.RayError as error:
            self._lose(slot, self._cause(error), "start")
            return
        slot.process, slot.heard = (node, pid), time.monotonic()
        if slot.started is not None:  # from now on it is its own time
            slot.started = slot.heard

    def _hear_ping(self, slot: Slot) -> None:
        try:
            activity, motionless_s, step = ray.get(slot.ping)
        except ray.exceptions.RayError as error:
            self._lose(slot, self._cause(error), slot.phase)
            return
        slot.ping, slot.heard, slot.phase = None, time.monotonic(), activity
        if step is not None:  # it may have been asked before the newest interval was answered
            slot.step = max(step, slot.step or 0)
        if motionless_s > patience_s(self.base):
            self._end(slot, blocked_cause(self.base, activity, motionless_s))

    def _cause(self, error: Exception) -> str:
        """Why a process died, in one line."""
        before, self.kills_before = self.kills_before, out_of_memory_kills()
        return cause_of_death(error, kernel_killed=self.kills_before > before)

    # ---------------------------------------------------------------------------------------------------------- slots
    def _launch(self, slot: Slot) -> None:
        """Give a slot a process, in its place; of a member with workers of its own these have the bundles."""
        from distml.runtime.slot import SlotActor

        resources, place = self.base.resources, self.places.groups[slot.index]
        actor: Any = SlotActor
        options: dict[str, Any] = {"num_cpus": 0}
        if resources.workers == 1:
            options = {"num_cpus": resources.cpus_per_worker, "num_gpus": resources.gpus_per_worker}
        there = PlacementGroupSchedulingStrategy(place, placement_group_bundle_index=0)
        base_json = self.base.model_dump_json(by_alias=True)
        code = (self.sources.directory, self.sources.files)
        slot.actor = actor.options(**options, scheduling_strategy=there).remote(
            slot.index, base_json, str(self.directory), code, self.start_weights, place
        )
        slot.hello, slot.heard, slot.process, slot.ping = slot.actor.hello.remote(), None, None, None
        slot.dropped, slot.kept = deque(), weakref.WeakSet()

    def _empty(self, slot: Slot) -> None:
        """No member is in it."""
        slot.member, slot.calls, slot.started = None, {}, None

    def _end(self, slot: Slot, cause: str) -> None:
        """End a process that does not do its work."""
        if slot.process is not None:
            kill(*slot.process, timeout_s=self.base.limits.heartbeat_s + CLOSE_PATIENCE_S)
        self._lose(slot, cause, slot.phase)

    def _lose(self, slot: Slot, cause: str, phase: str) -> None:
        """A process is gone, and its member with it; the slot is free."""
        ray.kill(slot.actor, no_restart=True)  # unreachable is not always dead
        member, step, slot.actor = slot.member, slot.step, None
        self.places.look(at_once=True)  # its node may have gone too
        self._empty(slot)
        if member is not None:
            self.gone.add(member)
            self.injections.pop(member, None)
            self.answers.append(Gone(member, "died", cause, phase, step))

    def close(self) -> None:
        """End all members and processes; does not wait for a Ray that no longer answers."""
        if ray.is_initialized():
            close_within(self._close, CLOSE_PATIENCE_S)
        self.quiet.close()

    def _close(self) -> None:
        for slot in self.all_slots:
            if slot.actor is not None:
                ray.kill(slot.actor, no_restart=True)
                slot.actor = None
        self.places.close()
        if self.owns_ray:
            ray.shutdown()
