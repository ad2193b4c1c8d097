"""Members in this process: a host (`population/host.py`) that carries out one command at a time. Deterministic.

`RayHost`, with an actor per slot, is in `ray_members.py`.
"""

from __future__ import annotations

import contextlib
import socket
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from distml.errors import UsageError
from distml.exchange.layout import Array
from distml.population.host import Answer, Gone, Handle
from distml.population.seat import Seat
from distml.runtime.cut import Cut
from distml.spec.placement_rules import why_not_inline
from distml.spec.schema import JobSpec
from distml.tasks.sources import SourceTree

Injections = Mapping[str, tuple[str, ...]]


class InlineHost:
    """All members in this process: `wait` carries out one command at a time, in their order; deterministic.

    Args:
        base: what all members have in common: resources, limits.
        sources: the user's files.
        directory: where members have their folders; a member's is `directory / name`.
        slots: members at the same time.
        injections: member -> failures to cause (`kill:rank=0,step=40`), until it is gone for the first time.
        start_weights: what `init` starts from.

    Raises:
        UsageError: the base asks for GPUs.
    """

    def __init__(
        self, base: JobSpec, sources: SourceTree, directory: Path, slots: int, injections: Injections | None = None,
        start_weights: Mapping[str, Array] | None = None,
    ) -> None:  # fmt: skip
        problem = why_not_inline(base, "members")
        if problem is not None:
            raise UsageError(problem)
        self.sources, self.directory, self.num_slots = sources, directory, slots
        self.injections, self.start_weights = dict(injections or {}), start_weights
        self.seats: dict[str, Seat] = {}
        self.commands: deque[tuple[str, Callable[[], Answer]]] = deque()
        self.gone: set[str] = set()

    @property
    def slots(self) -> int:
        """Members at the same time."""
        return self.num_slots

    @property
    def hosts(self) -> Sequence[str]:
        """This one."""
        return [socket.gethostname()]

    def start(self, member: str, job: JobSpec, state: Handle | None = None, watch: Sequence[str] = ()) -> None:
        """Build a member in a free slot."""
        if len(self.seats) >= self.num_slots:
            raise RuntimeError(f"no free slot for member {member}: {self.num_slots} are taken")
        seat = self.seats[member] = Seat(self.sources, self.directory, self.start_weights)
        self.gone.discard(member)
        injections = self.injections.get(member, ())
        self._tell(member, lambda: seat.start(member, job, state, watch, injections))

    def advance(self, member: str, until: int | None, keep: bool) -> None:
        """Train a member."""
        self._tell(member, lambda: self.seats[member].advance(member, until, keep))

    def copy(self, member: str, state: Handle, job: JobSpec, keep: bool = False) -> None:
        """Let a member take a state's shared half, then a job's values."""
        self._tell(member, lambda: self.seats[member].copy(member, lambda: state, job, keep))

    def _tell(self, member: str, command: Callable[[], Answer]) -> None:
        if member in self.gone:
            return
        if member not in self.seats:
            raise KeyError(f"there is no member {member}")
        self.commands.append((member, command))

    def release(self, member: str) -> None:
        """End a member now; what it was told and has not done is dropped."""
        self._forget(member)
        seat = self.seats.pop(member, None)
        if seat is not None:
            seat.release()

    def _forget(self, member: str) -> None:
        self.commands = deque(row for row in self.commands if row[0] != member)

    def fetch(self, state: Handle) -> Cut:
        """The handle is the state."""
        cut: Cut = state
        return cut

    def put(self, state: Cut) -> Handle:
        """The same."""
        return state

    def wait(self, timeout_s: float) -> list[Answer]:
        """Carry out the oldest command; nothing happens where there is none."""
        if not self.commands:
            return []
        member, command = self.commands.popleft()
        answer = command()
        if isinstance(answer, Gone):
            self._forget(member)
            self.seats.pop(member, None)
            self.gone.add(member)
            self.injections.pop(member, None)
        return [answer]

    def close(self) -> None:
        """End all members."""
        for member in list(self.seats):
            with contextlib.suppress(Exception):  # the others must still be closed
                self.release(member)
