"""Where a slot's process leaves states: large ones in shared memory, which other processes of its host read directly.

    donor:  live vectors ── one copy, in memory that is used again and again ──▶ segments
    target: /proc/PID/fd of the donor ── mapped, for reading ── one copy ──▶ live vectors

New pages are what costs most (a fresh copy takes many times as long as one in memory that was used before), so that
segments of states that nobody refers to any more are filled again. Where there is no shared memory, and for small
states, a copy is an array of its own, and travels through the object store.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from distml.exchange.layout import Array
from distml.exchange.segment import NoSharedMemory, Regions, Segment
from distml.runtime.cut import Cut

if TYPE_CHECKING:
    from torch import Tensor

SHARED_FROM_BYTES = 2**20  # of one vector
VECTOR = "vector"
Place = tuple[int, int, int, str]  # process, descriptor, elements, type


@dataclass(frozen=True)
class Left:
    """A state that was left in a process.

    Attributes:
        token: its number there.
        places: where its vectors are in shared memory, by (half's key, name); None: they are not.
        rest: the state without these vectors; None where there are no places.
    """

    token: int
    places: dict[tuple[str, str], Place] | None = None
    rest: Cut | None = None


@dataclass
class Filling:
    """The memory of one state; called once for each vector.

    Attributes:
        taken: by the address of the array that was filled.
    """

    memory: Memory
    taken: dict[int, Segment] = field(default_factory=dict)

    def __call__(self, vector: Tensor) -> Array:
        """A copy."""
        segment = self.memory.segment(vector)
        if segment is None:
            copy: Array = vector.detach().cpu().numpy().copy()
            return copy
        segment.tensor(VECTOR).copy_(vector)
        array = segment.array(VECTOR)
        self.taken[address(array)] = segment
        return array


class Memory:
    """A process's segments: in use, or to be filled again."""

    def __init__(self) -> None:
        self.spare: dict[tuple[int, str], list[Segment]] = {}
        self.filling = Filling(self)

    def begin(self) -> Callable[[Tensor], Array]:
        """For the next state."""
        self.filling = Filling(self)
        return self.filling

    def segment(self, vector: Tensor) -> Segment | None:
        """One for a vector; None: it is small, or there is no room."""
        kind = str(vector.dtype).removeprefix("torch.")
        if vector.numel() * vector.element_size() < SHARED_FROM_BYTES:
            return None
        spare = self.spare.get((vector.numel(), kind))
        if spare:
            return spare.pop()
        try:
            return Segment.create(Regions.build([(VECTOR, vector.numel(), kind)]))
        except NoSharedMemory:
            return None

    def take_back(self, filling: Filling) -> None:
        """Nobody refers to a state any more."""
        for segment in filling.taken.values():
            _, count, kind = segment.regions.places[VECTOR]
            self.spare.setdefault((count, kind), []).append(segment)


def left(token: int, cut: Cut, filling: Filling) -> Left:
    """How others find a state."""
    shared = cut.shared
    vectors = {("", "weights"): shared["weights"]} | {("moments", name): v for name, v in shared["moments"].items()}
    if not all(address(vector) in filling.taken for vector in vectors.values()):
        return Left(token)
    places = {key: _place(filling.taken[address(vector)]) for key, vector in vectors.items()}
    return Left(token, places, replace(cut, shared={**shared, "weights": None, "moments": {}}))


def _place(segment: Segment) -> Place:
    _, count, kind = segment.regions.places[VECTOR]
    return os.getpid(), segment.descriptor, count, kind


def read(found: Left) -> Cut:
    """A state of another process of this host; its vectors are that one's memory, for reading.

    Raises:
        LookupError: the process is gone.
    """
    assert found.places is not None
    assert found.rest is not None
    vectors = {key: _mapped(place) for key, place in found.places.items()}
    moments = {name: vector for (half, name), vector in vectors.items() if half == "moments"}
    return replace(found.rest, shared={**found.rest.shared, "weights": vectors["", "weights"], "moments": moments})


def _mapped(place: Place) -> Array:
    """All pages at once: one by one they cost more than the copy."""
    pid, number, count, kind = place
    size = count * np.dtype(kind).itemsize
    try:
        descriptor = os.open(f"/proc/{pid}/fd/{number}", os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise LookupError(f"the state to go on from was lost with its process ({error.strerror})") from None
    try:
        flags = mmap.MAP_SHARED | getattr(mmap, "MAP_POPULATE", 0)
        view = mmap.mmap(descriptor, size, flags=flags, prot=mmap.PROT_READ)
    except (OSError, ValueError) as error:
        raise LookupError(f"the state to go on from was lost with its process ({error})") from None
    finally:
        os.close(descriptor)
    return np.frombuffer(view, dtype=kind)


def address(array: Any) -> int:
    """Where an array begins."""
    return int(array.__array_interface__["data"][0])
