"""The workers of one host over one segment of shared memory.

The segment (`segment.py`) holds each worker's gradients, the host's weights, the optimiser's moments, and small boards
for messages. The first worker of the host creates it.

Nobody writes where somebody else does: each worker has one counter that only it advances, and whoever waits for it
sleeps in the kernel (futex) until it moves. A sleeper looks up every `POLL_S`: at the abort flag, and at its peers
(pidfd), so that a death ends every wait with `PeerLost`. A stopped peer is ended by the driver, and then noticed.

Shapes: W workers of this host, N elements of the model.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import math
import os
import select
import time
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from distml.exchange.channel import Group, PeerLost
from distml.exchange.layout import Array
from distml.exchange.segment import FUTEX_NUMBER, Segment

CACHE_LINE = 64
BOARD_BYTES = 2**18
POLL_S = 0.05
FUTEX_WAIT, FUTEX_WAKE = 0, 1
ABORT = 0  # the word that ends all waits; the workers' counters follow it


# --------------------------------------------------------------------------------------------------------------- waits
class _Timespec(ctypes.Structure):
    _fields_ = [("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long)]


_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long
_libc.syscall.argtypes = [ctypes.c_long, ctypes.c_void_p, ctypes.c_int, ctypes.c_uint32, ctypes.c_void_p,
                          ctypes.c_void_p, ctypes.c_int]  # fmt: skip


def futex_wait(address: int, value: int, seconds: float) -> bool:
    """Sleep while the word at `address` is `value`; False after `seconds`. Other threads of this process run on."""
    limit = _Timespec(int(seconds), int(seconds % 1 * 1e9))
    done = _libc.syscall(FUTEX_NUMBER or 0, address, FUTEX_WAIT, value & 0xFFFFFFFF, ctypes.byref(limit), None, 0)
    return done == 0 or ctypes.get_errno() != errno.ETIMEDOUT


def futex_wake(address: int) -> None:
    """Wake all who sleep at the word."""
    _libc.syscall(FUTEX_NUMBER or 0, address, FUTEX_WAKE, 2**30, None, None, 0)


class Words:
    """Counters of 32 bits in shared memory, each on a cache line of its own, on which others can sleep.

    A worker's store to the segment comes before its `set`, whose system call orders the two.
    """

    PER_LINE = CACHE_LINE // 4

    def __init__(self, array: Array) -> None:
        self.array, self.address = array, array.ctypes.data

    def get(self, index: int) -> int:
        """The word's value."""
        return int(self.array[index * self.PER_LINE])

    def set(self, index: int, value: int) -> None:
        """Store, and wake who sleeps at it."""
        self.array[index * self.PER_LINE] = np.uint32(value & 0xFFFFFFFF)
        futex_wake(self.address + index * CACHE_LINE)

    def put(self, index: int, value: int) -> None:
        """Store where nobody sleeps."""
        self.array[index * self.PER_LINE] = value & 0xFFFFFFFF

    def sleep(self, index: int, value: int, seconds: float) -> bool:
        """Sleep while the word has this value; False after `seconds`."""
        return futex_wait(self.address + index * CACHE_LINE, value, seconds)


class Host:
    """This worker among those of its host: waits that notice who is gone.

    Args:
        segment: with the regions `words`, `lengths` and `boards`.
        ranks: the run's ranks on this host, in order.
        rank: this worker's.
        pids: their process ids.
        timeout_s: of one wait; longer than anything healthy, since the driver ends what is lost much earlier.
        at: told the stages of an exchange as they come (a test's injector).
    """

    def __init__(
        self, segment: Segment, ranks: list[int], rank: int, pids: list[int], timeout_s: float,
        at: Callable[[str], None] = lambda stage: None,
    ) -> None:  # fmt: skip
        self.segment, self.ranks, self.index, self.size = segment, ranks, ranks.index(rank), len(ranks)
        self.words = Words(segment.array("words"))
        self.timeout_s, self.at = timeout_s, at
        self.lengths = segment.array("lengths")
        self.boards = segment.array("boards").reshape(self.size, BOARD_BYTES)
        self.sequence = 0
        self.watched: dict[int, int] = {}  # rank -> a descriptor of its process
        self.watched_pids: dict[int, int] = {}
        self.missing = [
            peer for peer, pid in zip(ranks, pids, strict=True) if peer != rank and not self.watch(peer, pid)
        ]

    def watch(self, rank: int, pid: int) -> bool:
        """Notice the death of this peer from now on; False if it is dead already."""
        if self.watched_pids.get(rank) == pid:
            return True
        self.unwatch(rank)
        try:
            self.watched[rank] = os.pidfd_open(pid)
        except OSError:
            return False
        self.watched_pids[rank] = pid
        return True

    def unwatch(self, rank: int) -> None:
        """Do not look at this peer any more."""
        self.watched_pids.pop(rank, None)
        if rank in self.watched:
            os.close(self.watched.pop(rank))

    def dead(self) -> list[int]:
        """Ranks among the watched ones whose processes have ended."""
        if not self.watched:
            return []
        poll = select.poll()
        for descriptor in self.watched.values():
            poll.register(descriptor, select.POLLIN)
        ended = {descriptor for descriptor, _ in poll.poll(0)}
        return [rank for rank, descriptor in self.watched.items() if descriptor in ended]

    def abort(self) -> None:
        """End every wait on this host with `PeerLost`."""
        self.words.set(ABORT, 1)
        for index in range(self.size):
            futex_wake(self.words.address + (1 + index) * CACHE_LINE)

    def check(self, awaited: str) -> None:
        """Whether it makes sense to go on.

        Raises:
            PeerLost: somebody has called `abort`.
        """
        if self.words.get(ABORT):
            raise PeerLost(f"rank {self.ranks[self.index]} waited for {awaited}: the group has broken up")

    def wait(self, word: int, ready: Callable[[int], bool], awaited: str) -> None:
        """Sleep until `ready(value of the word)`.

        Raises:
            PeerLost: a peer is dead, the group has broken up, or the limit is over.
        """
        deadline = 0.0
        while not ready(value := self.words.get(word)):
            self.check(awaited)
            if self.words.sleep(word, value, POLL_S):
                continue
            gone = self.dead() + self.missing
            deadline = deadline or time.monotonic() + self.timeout_s
            if gone or time.monotonic() > deadline:
                self.abort()
                cause = f"rank {gone[0]} has died" if gone else f"nothing for {self.timeout_s:g} s"
                raise PeerLost(f"rank {self.ranks[self.index]} waited for {awaited}: {cause}")

    def barrier(self, awaited: str) -> None:
        """Wait until every worker of this host has come here."""
        self.sequence += 1
        self.words.set(1 + self.index, self.sequence)
        for index, rank in enumerate(self.ranks):
            if index != self.index:
                self.wait(1 + index, self._reached, f"rank {rank} ({awaited})")

    def _reached(self, value: int) -> bool:
        return (value - self.sequence) & 0xFFFFFFFF < 2**31  # also when the counters have passed 2**32

    def exchange(self, payload: bytes) -> list[bytes]:
        """Everyone's payload, in the order of `ranks`; long ones in pieces."""
        parts: list[list[bytes]] = [[] for _ in range(self.size)]
        self.lengths[self.index] = len(payload)
        offset, longest = 0, 1
        while offset < longest:
            piece = payload[offset : offset + BOARD_BYTES]
            self.boards[self.index, : len(piece)] = np.frombuffer(piece, np.uint8)
            self.barrier("messages")
            for index in range(self.size):
                length = min(max(0, int(self.lengths[index]) - offset), BOARD_BYTES)
                parts[index].append(self.boards[index, :length].tobytes())
            longest = int(self.lengths[: self.size].max())
            self.barrier("messages to be read")
            offset += BOARD_BYTES
        return [b"".join(pieces) for pieces in parts]

    def sum(self, vector: Tensor) -> None:
        """Replace a small vector by its sum over the workers of this host, in rank order."""
        whole = vector.detach().contiguous().view(-1)
        step = BOARD_BYTES // whole.element_size()
        boards = torch.from_numpy(self.boards).view(whole.dtype)
        for start in range(0, whole.numel(), step):
            piece = whole[start : start + step]
            boards[self.index, : piece.numel()] = piece
            self.barrier("parts of a sum")
            total = boards[0, : piece.numel()].clone()
            for index in range(1, self.size):
                total += boards[index, : piece.numel()]
            piece.copy_(total)
            self.barrier("a sum to be read")
        vector.copy_(whole.view(vector.shape))

    def close(self) -> None:
        """Leave: whoever still waits for this worker stops waiting."""
        with contextlib.suppress(OSError):
            self.abort()
        for rank in list(self.watched):
            self.unwatch(rank)
        self.segment.close()


def host_regions(size: int) -> list[tuple[str, int, str]]:
    """What `Host` needs in a segment for `size` workers."""
    return [
        ("words", (2 + size) * Words.PER_LINE, "uint32"),
        ("lengths", size, "int64"),
        ("boards", size * BOARD_BYTES, "uint8"),
    ]


# --------------------------------------------------------------------------------------------------------------- group
class SharedMemoryGroup:
    """All ranks of a run as a group: shared memory inside each host, one rank of each host on the wire between them.

    Args:
        host: this worker's.
        hosts: the ranks of every host; the first of each is its leader.
        wire: the leaders' group (leaders only, several hosts only).
    """

    def __init__(self, host: Host, hosts: list[list[int]], wire: Group | None) -> None:
        self.host, self.hosts, self.wire = host, hosts, wire
        self.rank = host.ranks[host.index]
        self.size = sum(len(ranks) for ranks in hosts)
        self.shared_bytes = 0

    @property
    def bytes_sent(self) -> int:
        """By this rank: what others of its host have read of it, and what went over the wire."""
        return self.shared_bytes + (self.wire.bytes_sent if self.wire is not None else 0)

    def count_bytes(self, num_bytes: int) -> None:
        """Others of this host have read a sum over `num_bytes` of everyone: 2 (W - 1) / W of them for each worker."""
        self.shared_bytes += math.ceil(2 * (self.host.size - 1) / self.host.size * num_bytes)

    def all_reduce(self, vector: Tensor) -> None:
        """Replace `vector` by its sum over all ranks: in rank order inside a host."""
        if "scratch" in self.host.segment.regions.places and vector.numel() * vector.element_size() > BOARD_BYTES:
            self._reduce_long(vector)
        else:
            self.host.sum(vector)
        self.count_bytes(vector.numel() * vector.element_size())
        if len(self.hosts) > 1:
            if self.wire is not None:
                self.wire.all_reduce(vector)
            self._spread(vector)

    def _reduce_long(self, vector: Tensor) -> None:
        """Each worker sums its slice of everyone's vector in the first one's place."""
        size, count = self.host.size, vector.numel()
        rows = self.host.segment.tensor("scratch").view(size, -1).view(vector.dtype)[:, :count]
        own = slice(count * self.host.index // size, count * (self.host.index + 1) // size)
        rows[self.host.index].copy_(vector.view(-1))
        self.host.barrier("vectors to be summed")
        for index in range(1, size):
            rows[0, own] += rows[index, own]
        self.host.barrier("a sum")
        vector.view(-1).copy_(rows[0])
        self.host.barrier("a sum to be read")

    def _spread(self, vector: Tensor) -> None:
        """Everyone of a host takes the leader's vector."""
        leads = self.host.index == 0
        payload = vector.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes() if leads else b""
        found = self.host.exchange(payload)[0]
        if not leads:
            vector.copy_(torch.frombuffer(bytearray(found), dtype=vector.dtype).view(vector.shape))

    def all_gather(self, payload: bytes) -> list[bytes]:
        """Every rank's payload, in rank order."""
        own = self.host.exchange(payload)
        if len(self.hosts) == 1:
            return own
        message = b""
        if self.wire is not None:
            packs = [unpack(pack) for pack in self.wire.all_gather(pack(own))]
            found = {rank: part for ranks, parts in zip(self.hosts, packs, strict=True)
                     for rank, part in zip(ranks, parts, strict=True)}  # fmt: skip
            message = pack([found[rank] for rank in range(self.size)])
        return unpack(self.host.exchange(message)[0])

    def close(self) -> None:
        """Break up."""
        self.host.close()
        close = getattr(self.wire, "close", None)
        if close is not None:
            close()


def pack(parts: list[bytes]) -> bytes:
    """Byte strings as one: number of them, lengths, contents."""
    return np.array([len(parts), *map(len, parts)], np.int64).tobytes() + b"".join(parts)


def unpack(message: bytes) -> list[bytes]:
    """The inverse of `pack`."""
    count = int(np.frombuffer(message, np.int64, 1)[0])
    ends = 8 * (1 + count) + np.cumsum(np.frombuffer(message, np.int64, count + 1)[1:], dtype=np.int64)
    starts = [8 * (1 + count), *(int(end) for end in ends[:-1])]
    return [message[start : int(end)] for start, end in zip(starts, ends, strict=True)]


def is_finite(vector: Tensor) -> bool:
    """Whether all elements are finite numbers, in one pass and without a copy."""
    if not vector.numel():
        return True
    least, largest = torch.aminmax(vector)
    return math.isfinite(float(least)) and math.isfinite(float(largest))
