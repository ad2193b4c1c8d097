"""Collectives over torch.distributed: gloo between CPUs, NCCL between GPUs, with a rendezvous of our own.

The rendezvous store listens on the node's own address only (loopback when all ranks share a host), on a port that the
kernel picks. A peer's death closes its connections, which ends every collective here with `PeerLost`; whoever gets
one closes its own side, so that the news reaches ranks that wait for somebody else.
"""

from __future__ import annotations

import datetime
import math
import os
import socket
from collections.abc import Sequence

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import TCPStore  # type: ignore[attr-defined, unused-ignore]

from distml.exchange.channel import PeerLost

LOOPBACK = "127.0.0.1"


def open_rendezvous(address: str) -> socket.socket:
    """A listening socket on `address`, whose port the kernel picks."""
    listener = socket.create_server((address, 0), backlog=256)
    listener.set_inheritable(True)
    return listener


class ProcessGroup:
    """One rank of a group.

    Args:
        rank, size: place in the group.
        host, port: of rank 0's rendezvous.
        listener: rank 0's socket.
        timeout_s: of one collective; longer than anything healthy, since the driver ends what is lost much earlier.
        own_address: of this rank's node, on whose interface it talks; None: it is rank 0's.

    Attributes:
        overlaps: whether sums are better taken while backward runs (`exchange/ddp.py`): between GPUs, and between
            hosts, where a wire works beside the processor.
    """

    def __init__(
        self, rank: int, size: int, host: str, port: int, listener: socket.socket | None, device: torch.device,
        timeout_s: float, own_address: str | None = None,
    ) -> None:  # fmt: skip
        self.rank, self.size, self.bytes_sent = rank, size, 0
        self.overlaps = device.type == "cuda" or host != LOOPBACK
        use_interface_of(own_address or host)
        timeout = datetime.timedelta(seconds=timeout_s)
        try:
            descriptor = listener.detach() if listener is not None else None
            self._store = TCPStore(host, port, size, is_master=rank == 0, timeout=timeout, wait_for_workers=False,
                                        master_listen_fd=descriptor, use_libuv=True)  # fmt: skip
            backend = "nccl" if device.type == "cuda" else "gloo"
            name = f"distml-{host}:{port}"
            dist.init_process_group(
                backend, store=self._store, rank=rank, world_size=size, timeout=timeout, group_name=name
            )
            self._buffer_device = device
        except RuntimeError as error:
            raise PeerLost(f"rank {rank} could not join the group of {size} at {host}:{port}: {error}") from error

    def all_reduce(self, vector: Tensor) -> None:
        """Replace `vector` by its sum over all ranks."""
        moved = vector.to(self._buffer_device)
        try:
            dist.all_reduce(moved)
        except RuntimeError as error:
            raise self.lost("all_reduce", error) from error
        if moved is not vector:
            vector.copy_(moved)
        self.bytes_sent += ring_bytes(vector, self.size)

    def start_all_reduce(self, vector: Tensor) -> torch.futures.Future[list[Tensor]]:
        """Begin what `all_reduce` does, for a vector on this rank's device; it is done when the future is."""
        self.bytes_sent += ring_bytes(vector, self.size)
        return dist.all_reduce(vector, async_op=True).get_future()  # type: ignore[union-attr, no-any-return]

    def all_gather(self, payload: bytes) -> list[bytes]:
        """Every rank's payload: lengths first, then bytes padded to the longest."""
        length = torch.tensor([len(payload)], dtype=torch.int64)
        lengths = [int(one) for one in self._gather(length)]
        own = torch.zeros(max(1, *lengths), dtype=torch.uint8)
        own[: len(payload)].numpy()[:] = np.frombuffer(payload, np.uint8)
        rows = self._gather(own)
        self.bytes_sent += (self.size - 1) * len(payload)  # as a ring sends it, which passes on what it gets
        return [row[:length].numpy().tobytes() for row, length in zip(rows, lengths, strict=True)]

    def _gather(self, own: Tensor) -> list[Tensor]:
        """Everyone's tensor of the same shape, on the CPU."""
        moved = own.to(self._buffer_device)
        rows = [torch.empty_like(moved) for _ in range(self.size)]
        try:
            dist.all_gather(rows, moved)
        except RuntimeError as error:
            raise self.lost("all_gather", error) from error
        return [row.cpu() for row in rows]

    def all_to_all(self, parts: Sequence[Tensor], lengths: Sequence[int]) -> list[Tensor]:
        """Send `parts[p]` to rank p; what each rank sent here, in rank order. Empty parts are no messages.

        Args:
            parts: one for each rank: uint8 [L_p].
            lengths: bytes that each rank sends here.
        """
        received = [part if peer == self.rank else torch.empty(length, dtype=torch.uint8, device=self._buffer_device)
                    for peer, (part, length) in enumerate(zip(parts, lengths, strict=True))]  # fmt: skip
        peers = [peer for peer in range(self.size) if peer != self.rank]
        sent = {peer: parts[peer].to(self._buffer_device) for peer in peers if parts[peer].numel()}
        calls = [dist.P2POp(dist.irecv, received[peer], peer) for peer in peers if lengths[peer]]
        calls += [dist.P2POp(dist.isend, part, peer) for peer, part in sent.items()]
        try:
            for work in dist.batch_isend_irecv(calls) if calls else ():
                work.wait()
        except RuntimeError as error:
            raise self.lost("all_to_all", error) from error
        self.bytes_sent += sum(part.numel() for part in sent.values())
        return received

    def lost(self, operation: str, error: RuntimeError) -> PeerLost:
        """Break up, and say what an operation that failed has met."""
        self.close()
        text = " ".join(str(error).split())
        return PeerLost(f"rank {self.rank}, {operation} of {self.size} ranks: {text[:200]}")

    def close(self) -> None:
        """Close all connections."""
        if dist.is_initialized():
            dist.destroy_process_group()


def ring_bytes(vector: Tensor, size: int) -> int:
    """Bytes that one rank of a ring all-reduce sends: 2 (W - 1) / W of the vector."""
    return math.ceil(2 * (size - 1) / size * vector.numel() * vector.element_size())


def use_interface_of(address: str) -> None:
    """Let gloo and NCCL talk on the interface that has this address; they choose where none here has it."""
    interface = interface_of(address)
    for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        if interface is None:
            os.environ.pop(variable, None)
        else:
            os.environ[variable] = interface


def interface_of(address: str) -> str | None:
    """The network interface that has this IPv4 address, or None."""
    import psutil

    for name, addresses in psutil.net_if_addrs().items():
        if any(one.family == socket.AF_INET and one.address == address for one in addresses):
            return str(name)
    return None
