"""A segment of shared memory with named regions, and the states that are kept in it for a recovery. No torch: the
driver maps it too, so that a kept state outlives all workers.

It is created under /dev/shm with mode 0600 and its pages are reserved (a full /dev/shm is then an error, not a crash);
it is unlinked at once, and others of this host and user open it through /proc/PID/fd. The kernel frees it with the
last process, however that one ends.
"""

from __future__ import annotations

import math
import mmap
import os
import platform
import secrets
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from distml.exchange.channel import PeerLost
from distml.exchange.layout import Array

if TYPE_CHECKING:
    from torch import Tensor

FOLDER = "/dev/shm"
MARGIN_BYTES = 16 * 2**20  # what is left to others there
ALIGNMENT = 4096
KEPT = 2  # states: the newest that is whole, and the one that is being written
FUTEX_NUMBER = {"x86_64": 202, "aarch64": 98, "riscv64": 98}.get(platform.machine())
HAS_FUTEX = FUTEX_NUMBER is not None


class NoSharedMemory(Exception):
    """There is no segment to be had here: why."""


@dataclass(frozen=True)
class Regions:
    """Where each named array lies in a segment: name -> (offset in bytes, elements, type)."""

    places: dict[str, tuple[int, int, str]]
    num_bytes: int

    @classmethod
    def build(cls, arrays: Iterable[tuple[str, int, str]]) -> Regions:
        """From (name, elements, NumPy type), each aligned to a page."""
        places, offset = {}, 0
        for name, count, dtype in arrays:
            places[name] = offset, count, dtype
            offset += math.ceil(count * np.dtype(dtype).itemsize / ALIGNMENT) * ALIGNMENT
        return cls(places, max(offset, ALIGNMENT))


def free_bytes() -> int:
    """What a new segment may take of /dev/shm here; 0 without one."""
    if not HAS_FUTEX or not hasattr(os, "pidfd_open"):
        return 0
    try:
        found = os.statvfs(FOLDER)
    except OSError:
        return 0
    return max(0, found.f_bavail * found.f_frsize - MARGIN_BYTES)


class Segment:
    """Shared memory with named regions. `descriptor` stays open, so that later peers can open it too."""

    def __init__(self, descriptor: int, regions: Regions) -> None:
        self.descriptor, self.regions = descriptor, regions
        self._bytes = np.frombuffer(mmap.mmap(descriptor, regions.num_bytes), dtype=np.uint8)

    @classmethod
    def create(cls, regions: Regions) -> Segment:
        """A new one, all zero.

        Raises:
            NoSharedMemory: it does not fit.
        """
        path = f"{FOLDER}/distml-{os.getpid()}-{secrets.token_hex(8)}"
        if regions.num_bytes > free_bytes():
            raise NoSharedMemory(lacking(regions.num_bytes, free_bytes()))
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise NoSharedMemory(f"{FOLDER} cannot be written: {error.strerror}") from error
        try:
            os.unlink(path)
            os.posix_fallocate(descriptor, 0, regions.num_bytes)
        except OSError as error:
            os.close(descriptor)
            raise NoSharedMemory(f"{regions.num_bytes} bytes in {FOLDER}: {error.strerror}") from error
        return cls(descriptor, regions)

    @classmethod
    def open(cls, pid: int, descriptor: int, regions: Regions) -> Segment:
        """The one that process `pid` of this host and user has open.

        Raises:
            PeerLost: that process is gone.
        """
        try:
            own = os.open(f"/proc/{pid}/fd/{descriptor}", os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            raise PeerLost(f"the segment of process {pid} cannot be opened: {error.strerror}") from error
        if os.fstat(own).st_size != regions.num_bytes:
            os.close(own)
            raise PeerLost(f"process {pid} has another file open than the segment that was named")
        return cls(own, regions)

    def array(self, name: str) -> Array:
        """A region as a NumPy array (a view)."""
        offset, count, dtype = self.regions.places[name]
        return self._bytes[offset : offset + count * np.dtype(dtype).itemsize].view(dtype)

    def tensor(self, name: str) -> Tensor:
        """A region as a torch tensor (a view)."""
        import torch

        return torch.from_numpy(self.array(name))

    def close(self) -> None:
        """No peer can open it through this process any more; the memory goes with its last view."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1


def lacking(needed: int, free: int) -> str:
    """Why a segment does not fit."""
    return f"{FOLDER} has {free / 2**20:.0f} MiB to give, {needed / 2**20:.0f} MiB are needed"


# --------------------------------------------------------------------------------------------------------- kept states
def kept_regions(numel: int, kind: str, moments: Iterable[str], parts: int) -> list[tuple[str, int, str]]:
    """Where states are kept that `parts` workers write together: vectors, and who has written which version."""
    return [
        ("kept-versions", KEPT * parts, "int64"),
        *((f"kept-{slot}-{name}", numel, kind) for slot in range(KEPT) for name in ("weights", *moments)),
    ]


class KeptStates:
    """Writes a worker's part of the states that are kept in a segment, in turns.

    Args:
        segment: with `kept_regions`.
        part: which of the writers this one is.
    """

    def __init__(self, segment: Segment, part: int) -> None:
        self.segment, self.part, self.slot = segment, part, 0
        self.versions = segment.array("kept-versions").reshape(KEPT, -1)

    def write(self, version: int, vectors: Mapping[str, Tensor], own: slice) -> None:
        """Keep these elements of "weights" and the moments; a state is whole when all parts are written."""
        self.slot = (self.slot + 1) % KEPT
        self.versions[self.slot, self.part] = -1
        for name, vector in vectors.items():
            self.segment.tensor(f"kept-{self.slot}-{name}")[own] = vector[own]
        self.versions[self.slot, self.part] = version


def read_kept(segment: Segment, version: int) -> dict[str, Array] | None:
    """Copies of what was kept at a version, "weights" and each moment; None if it is not there whole."""
    versions = segment.array("kept-versions").reshape(KEPT, -1)
    for slot in range(KEPT):
        if not (versions[slot] == version).all():
            continue
        prefix = f"kept-{slot}-"
        names = [name for name in segment.regions.places if name.startswith(prefix)]
        found = {name.removeprefix(prefix): segment.array(name).copy() for name in names}
        return found if (versions[slot] == version).all() else None
    return None
