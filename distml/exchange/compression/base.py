"""What goes over the wire instead of a gradient, and what stays behind: the interface, and what its methods share.

A `Compressor` belongs to one rank. Under all_reduce it replaces a phase's gradient by the sum of what all ranks sent;
towards parameter servers it turns the gradient into one payload per server (the pull stays uncompressed: weights are
no sums that a later message could mend). What a rank has not sent it keeps in a residual and adds to its next gradient
(error feedback; Seide et al. 2014, Karimireddy et al. 2019), so that over time everything arrives:

    corrected = gradient + residual;   sent = decode(encode(corrected));   residual = corrected - sent

Count, votes and rows (the message's tail) always go exactly, in the same message.

Payloads are read by the logical index alone: rows of a fixed width, counted from each segment's start, are coded
independently, and shards are cut at whole rows; so a payload's decoded values do not depend on where it was cut.

Shapes: N elements of the flat vector, n of a range or phase of it, W ranks; a payload is uint8 [L].
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

import torch
from torch import Tensor

from distml.exchange.channel import WireGroup
from distml.exchange.flat import TAIL, from_numpy, to_numpy
from distml.exchange.layout import MAX_BLOCK, Layout

Range = tuple[int, int]
"""Elements [start, stop) of the flat vector, of one phase, cut at blocks."""

RESIDUAL = "residual"
ALIGNMENT = 8  # bytes: a payload's sections are viewed as the types that they hold


@dataclass(frozen=True)
class Tile:
    """Elements [start, stop) of a range: whole rows of `width`, few enough to stay in the processor's cache."""

    start: int
    stop: int
    width: int

    @property
    def num_rows(self) -> int:
        """Rows of this tile."""
        return (self.stop - self.start) // self.width


def tiles_of(layout: Layout, span: Range, width: int, limit: int) -> tuple[Tile, ...]:
    """The tiles of a range, in order; each segment's last row may be shorter, and is a tile of its own."""
    found: list[Tile] = []
    for segment in layout.segments:
        start, stop = max(segment.start, span[0]) - span[0], min(segment.stop, span[1]) - span[0]
        if start >= stop:
            continue
        whole = stop - (stop - start) % width
        step = max(width, limit - limit % width)
        found += [Tile(first, min(first + step, whole), width) for first in range(start, whole, step)]
        if whole < stop:
            found.append(Tile(whole, stop, stop - whole))
    return tuple(found)


def phase_ranges(layout: Layout, phase: int, count: int) -> list[Range]:
    """A phase cut at blocks into `count` nearly equal ranges, possibly empty ones."""
    first, last = layout.phase_range(phase)
    starts = [start for start, _ in layout.blocks if first <= start < last] + [last]

    def nearest(target: float) -> int:
        return min(starts, key=lambda start: abs(start - target))

    cuts = [first, *(nearest(first + (last - first) * index / count) for index in range(1, count)), last]
    return list(itertools.pairwise(cuts))


class Decoder(Protocol):
    """What a server needs: it has no residuals."""

    def decode(self, span: Range, payloads: Sequence[Tensor], total: Tensor) -> None:
        """Overwrite `total` [n] by the sum of what the payloads of this range say, added in their order."""
        ...


Take = Callable[[Tile], Tensor]
"""What is to be sent of a tile's elements, [width · rows]; the encoder leaves in its place what it did not send."""


class Codec(ABC):
    """How tiles become bytes and back; without state, so that all ranks and servers may hold one.

    Args:
        layout: the flat vector's index.
        like: a tensor whose type and device gradients have.
        width: elements of a row.
    """

    sums_stay_dense = True  # slices of a sum are as small as slices of its parts

    def __init__(self, layout: Layout, like: Tensor, width: int) -> None:
        self.layout, self.dtype, self.device, self.width = layout, like.dtype, like.device, width
        limit = MAX_BLOCK if like.device.type == "cpu" else max(1, layout.numel)
        self.tiles = lru_cache(maxsize=None)(lambda span: tiles_of(layout, span, width, limit))

    @abstractmethod
    def num_bytes(self, span: Range) -> int:
        """Length L of this range's payload, a multiple of `ALIGNMENT`."""

    @abstractmethod
    def encode(self, span: Range, take: Take, payload: Tensor) -> None:
        """Fill `payload` [L] tile by tile."""

    @abstractmethod
    def decode(self, span: Range, payloads: Sequence[Tensor], total: Tensor) -> None:
        """As `Decoder.decode`."""


class Compressor(ABC):
    """One rank's half.

    Args:
        layout: the flat vector's index.
        like: a tensor whose type and device gradients have.
        residuals: names of the vectors [N] that this rank keeps; none without error feedback.
    """

    def __init__(self, layout: Layout, like: Tensor, residuals: Sequence[str]) -> None:
        self.layout = layout
        self.residuals = {name: torch.zeros(layout.numel, dtype=like.dtype, device=like.device) for name in residuals}

    @property
    def residual(self) -> Tensor | None:
        """What was not sent yet [N]; None without error feedback."""
        return self.residuals.get(RESIDUAL)

    @abstractmethod
    def reduce(self, phase: int, message: Tensor, group: WireGroup) -> None:
        """Replace gradients and tail [n + TAIL] of a phase by the sum over ranks of what they sent; keep the rest."""

    @abstractmethod
    def encode(self, phase: int, gradients: Tensor, ranges: Sequence[Range]) -> list[Tensor]:
        """One payload per range of the phase; the ranges cover `gradients` [n], which is used up.

        The payloads are overwritten by the next call.
        """

    def state(self) -> dict[str, Any]:
        """Copies: under `sums` the vectors that may be added up over ranks, under `common` what may come from any."""
        vectors = {name: to_numpy(vector).copy() for name, vector in self.residuals.items()}
        return {"sums": {name: self.layout.names(vector) for name, vector in vectors.items()}, "common": {}}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """The inverse of `state`, also of another method's; what is missing starts at zero."""
        sums = state.get("sums", {})
        for name, vector in self.residuals.items():
            if name in sums:
                vector.copy_(from_numpy(self.layout.flatten(sums[name])))
            else:
                vector.zero_()


class CodecCompressor(Compressor):
    """A codec with error feedback.

    Two ranks gather each other's payloads. More would each send W - 1 of them; so where sums stay dense, each rank
    gets everybody's slices of one range, sums them, and sends the sum, compressed once more, to all: 2 (W - 1) / W
    payloads, as an uncompressed ring does (the compressed all-reduce of Tang et al. 2021). What the second rounding
    leaves out goes to the residual of the rank that rounded.
    """

    def __init__(self, codec: Codec, residuals: Sequence[str] = (RESIDUAL,)) -> None:
        super().__init__(codec.layout, torch.empty(0, dtype=codec.dtype, device=codec.device), residuals)
        self.codec = codec
        self.buffers: dict[tuple[Range, int], Tensor] = {}
        self.tail_bytes = TAIL * codec.dtype.itemsize

    def encode(self, phase: int, gradients: Tensor, ranges: Sequence[Range]) -> list[Tensor]:
        first = self.layout.phase_range(phase)[0]
        return [self._encode(span, gradients[span[0] - first : span[1] - first]) for span in ranges]

    def _encode(self, span: Range, gradients: Tensor, room: int = 0) -> Tensor:
        """One range's payload, with room for a tail behind it."""
        payload = self._buffer(span, room)
        self.codec.encode(span, self._taker(span, gradients), payload[: payload.numel() - room])
        return payload

    def _taker(self, span: Range, gradients: Tensor) -> Take:
        residual = self.residual
        if residual is None:
            return lambda tile: gradients[tile.start : tile.stop]
        own = residual[span[0] : span[1]]
        return lambda tile: own[tile.start : tile.stop].add_(gradients[tile.start : tile.stop])

    def _buffer(self, span: Range, room: int) -> Tensor:
        """Kept from step to step: fresh memory of this size costs as much as filling it."""
        if (span, room) not in self.buffers:
            size = self.codec.num_bytes(span) + room
            self.buffers[span, room] = torch.zeros(size, dtype=torch.uint8, device=self.codec.device)
        return self.buffers[span, room]

    def reduce(self, phase: int, message: Tensor, group: WireGroup) -> None:
        gradients, tail = message[:-TAIL], message[-TAIL:]
        if self.codec.sums_stay_dense and group.size > 2:
            self._reduce_by_slices(phase, gradients, tail, group)
            return
        whole = self.layout.phase_range(phase)
        payload = self._encode(whole, gradients, self.tail_bytes)
        payload[-self.tail_bytes :].copy_(tail.view(torch.uint8))
        payloads = group.all_to_all([payload] * group.size, [payload.numel()] * group.size)
        self.codec.decode(whole, [one[: -self.tail_bytes] for one in payloads], gradients)
        self._sum_tails(payloads, tail)

    def _reduce_by_slices(self, phase: int, gradients: Tensor, tail: Tensor, group: WireGroup) -> None:
        first, ranges = self.layout.phase_range(phase)[0], phase_ranges(self.layout, phase, group.size)
        mine = ranges[group.rank]
        parts = self.encode(phase, gradients, ranges)
        slices = group.all_to_all(parts, [parts[group.rank].numel()] * group.size)
        total = gradients[mine[0] - first : mine[1] - first]
        self.codec.decode(mine, slices, total)
        summed = self._buffer(mine, self.tail_bytes)
        self.codec.encode(mine, lambda tile: total[tile.start : tile.stop], summed[: -self.tail_bytes])
        summed[-self.tail_bytes :].copy_(tail.view(torch.uint8))
        if self.residual is not None:
            self.residual[mine[0] : mine[1]].add_(total)
        lengths = [self.codec.num_bytes(span) + self.tail_bytes for span in ranges]
        sums = group.all_to_all([summed] * group.size, lengths)
        for span, one in zip(ranges, sums, strict=True):
            self.codec.decode(span, [one[: -self.tail_bytes]], gradients[span[0] - first : span[1] - first])
        self._sum_tails(sums, tail)

    def _sum_tails(self, payloads: Sequence[Tensor], tail: Tensor) -> None:
        tail.zero_()
        for payload in payloads:
            tail.add_(payload[-self.tail_bytes :].view(tail.dtype))


def padded(num_bytes: int) -> int:
    """The next multiple of `ALIGNMENT`."""
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT
