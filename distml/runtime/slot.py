"""The process of a slot on Ray: a `Seat` as an actor, and the states that its members have left in it.

    host ── start, advance, copy, release ──▶ slot      one after the other, each answered by one `Answer`
    host ── ping, give ─────────────────────▶ slot      own threads: answered while a member trains
    slot ── give ───────────────────────────▶ slot      a copy fetches the donor's state: on one host from its
                                              memory (`kept.py`), else, and small ones, through the object store

A state that is kept stays in this process as it is. Only when somebody asks for it is it put into the object store, by
a thread of its own, so that a copy never waits for the donor's interval. A member that is told to take a state whose
process has died says so itself. torch is imported in the constructor.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup

from distml.exchange.layout import Array
from distml.population.host import Advanced, Answer, Copied
from distml.population.member import MakeGroup
from distml.population.seat import Seat
from distml.runtime.actors import open_log, patience_s, prepare_process
from distml.runtime.cut import Cut
from distml.runtime.group import WorkerGroup
from distml.runtime.kept import Filling, Left, Memory, left, read
from distml.runtime.ray import RayRuntime
from distml.spec.schema import JobSpec
from distml.tasks.sources import SourceTree


def job_of(job_json: str) -> JobSpec:
    """A job as it travels."""
    return JobSpec.model_validate_json(job_json, by_alias=True, by_name=False)


@ray.remote(num_cpus=0, max_restarts=0, concurrency_groups={"control": 1, "states": 1})
class SlotActor:
    """One slot's process.

    Args:
        index: of the slot.
        base_json: what all members have in common.
        directory: where members have their folders.
        code: the user's files, and where they came from.
        place: of the workers of a member with several.
    """

    def __init__(
        self, index: int, base_json: str, directory: str, code: tuple[str, dict[str, str]],
        start_weights: Mapping[str, Array] | None, place: PlacementGroup | None,
    ) -> None:  # fmt: skip
        open_log(os.path.dirname(directory), f"slot-{index}")
        self.base, self.directory, self.place = job_of(base_json), Path(directory), place
        self.kept: dict[int, tuple[Cut, Filling]] = {}
        self.memory = Memory()
        self.count = 0
        prepare_process(self.base)
        import distml.loop  # noqa: F401  (now, while the other slots do)

        self.sources = SourceTree(*code)
        self.seat = Seat(self.sources, self.directory, start_weights, self._make_group, self.memory.begin)

    def _make_group(self, name: str, injections: tuple[str, ...]) -> MakeGroup:
        def make(job: JobSpec) -> WorkerGroup:
            folder = self.directory / name
            return RayRuntime(job, self.sources, None, folder, injections, place=self.place, recovers=False)

        return make

    # ------------------------------------------------------------------------------------------------------- commands
    def start(
        self, name: str, job_json: str, state: list[Any], watch: Sequence[str], injections: tuple[str, ...]
    ) -> Answer:
        """Build a member, with a state by reference if there is one in the list."""
        try:
            cut = self._fetch(state[0]) if state else None
        except LookupError as error:
            return self.seat.refuse(name, "start", error)
        return self.seat.start(name, job_of(job_json), cut, watch, injections)

    def advance(self, name: str, until: int | None, keep: bool) -> Answer:
        """Train it."""
        return self._keeping(self.seat.advance(name, until, keep))

    def copy(self, name: str, state: list[Any], job_json: str, keep: bool) -> Answer:
        """Let it take the state behind a reference, then the values of a job."""
        return self._keeping(self.seat.copy(name, lambda: self._fetch(state[0]), job_of(job_json), keep))

    def release(self) -> None:
        """End the member."""
        with contextlib.suppress(Exception):  # nobody asks for it any more
            self.seat.release()

    def _fetch(self, reference: Any) -> Cut:
        """A state of any process: in shared memory, or by reference.

        Raises:
            LookupError: it is lost.
        """
        if isinstance(reference, Left):
            return read(reference)
        try:
            cut: Cut = ray.get(reference, timeout=patience_s(self.base))
        except ray.exceptions.RayError as error:
            raise LookupError(f"the state to go on from was lost with its process ({type(error).__name__})") from None
        return cut

    def _keeping(self, answer: Answer) -> Answer:
        """The answer with its state left here, under a number."""
        if not isinstance(answer, (Advanced, Copied)) or answer.state is None:
            return answer
        self.count += 1
        self.kept[self.count] = answer.state, self.memory.filling
        return replace(answer, state=left(self.count, answer.state, self.memory.filling))

    def num_kept(self) -> int:
        """States that are kept here."""
        return len(self.kept)

    # -------------------------------------------------------------------------------------------------- at any time
    @ray.method(concurrency_group="states")
    def give(self, token: int) -> Cut:
        """A state, into the object store."""
        return self.kept[token][0]

    @ray.method(concurrency_group="states")
    def drop(self, tokens: Sequence[int]) -> None:
        """Nobody refers to these states any more: their memory is filled again. What was given before, is copied."""
        for token in tokens:
            self.memory.take_back(self.kept.pop(token)[1])

    @ray.method(concurrency_group="control")
    def hello(self) -> tuple[str, int, str]:
        """Node, process and host."""
        return ray.get_runtime_context().get_node_id(), os.getpid(), socket.gethostname()

    @ray.method(concurrency_group="control")
    def ping(self) -> tuple[str, float, int | None]:
        """Alive: what its member is doing, for how many seconds it has not moved in it, and at which step."""
        return (*self.seat.activity, self.seat.step)
