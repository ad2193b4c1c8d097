"""topk: the largest elements with their places, with momentum correction (Lin et al. 2018, Deep Gradient Compression).

Each block sends its own largest elements, as many as its share: so the choice does not depend on where shards are cut,
and a place takes 16 bits. With an optimiser that has momentum a rank accumulates velocity u instead of gradients (their
equation 4), and where an element is sent both start anew (momentum factor masking):

    u = m u + g;   v = v + u;   send the largest |v|;   u = v = 0 where sent

The update is then made without momentum. Without momentum this is plain error feedback (u = g).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from distml.exchange.compression.base import Codec, CodecCompressor, Range, Take, Tile, padded
from distml.exchange.layout import Layout

VELOCITY = "velocity"
SAMPLED_WIDTH = 16_384  # rows from this width on are searched from a sampled threshold
SAMPLE_STEP = 32  # of a row's elements one in so many is looked at


@dataclass
class Sections:
    """Typed views of a payload."""

    values: Tensor  # gradient's type [K]
    places: Tensor  # int16 [K]: 0 to 65,535 within the row


class TopK(Codec):
    """Payload: K values, then K places."""

    sums_stay_dense = False

    def __init__(self, layout: Layout, like: Tensor, fraction: float) -> None:
        super().__init__(layout, like, width=layout.block_size)
        self.fraction = fraction
        self.row_starts = lru_cache(maxsize=None)(self._row_starts)

    def kept(self, width: int) -> int:
        """Elements that a row sends: its share, at least one."""
        return max(1, round(self.fraction * width))

    def _row_starts(self, span: Range) -> Tensor:
        """Where the row of each sent element begins, int64 [K]."""
        rows = [(start, self.kept(tile.width)) for tile in self.tiles(span)
                for start in range(tile.start, tile.stop, tile.width)]  # fmt: skip
        starts = torch.tensor([start for start, _ in rows], dtype=torch.int64)
        counts = torch.tensor([count for _, count in rows], dtype=torch.int64)
        return starts.repeat_interleave(counts).to(self.device)

    def num_bytes(self, span: Range) -> int:
        kept = sum(tile.num_rows * self.kept(tile.width) for tile in self.tiles(span))
        return padded(kept * self.dtype.itemsize) + padded(2 * kept)

    def _sections(self, span: Range, payload: Tensor) -> Sections:
        kept = self.row_starts(span).numel()
        size = kept * self.dtype.itemsize
        start = padded(size)
        return Sections(payload[:size].view(self.dtype), payload[start : start + 2 * kept].view(torch.int16))

    def encode(self, span: Range, take: Take, payload: Tensor) -> None:
        sections, sent = self._sections(span, payload), 0
        for tile in self.tiles(span):
            corrected = take(tile).view(-1, tile.width)
            count = self.kept(tile.width)
            chosen = largest(corrected, count)
            end = sent + tile.num_rows * count
            sections.places[sent:end].view(-1, count).copy_(chosen)  # the upper half wraps to negative numbers
            sections.values[sent:end].view(-1, count).copy_(corrected.gather(1, chosen))
            corrected.scatter_(1, chosen, 0.0)
            sent = end

    def positions(self, span: Range, payload: Tensor) -> Tensor:
        """Where in the range the sent elements lie, int64 [K]."""
        return self._sections(span, payload).places.to(torch.int64).bitwise_and_(0xFFFF).add_(self.row_starts(span))

    def decode(self, span: Range, payloads: Sequence[Tensor], total: Tensor) -> None:
        total.zero_()
        for payload in payloads:
            total.index_add_(0, self.positions(span, payload), self._sections(span, payload).values)


def largest(rows: Tensor, count: int) -> Tensor:
    """Places of each row's `count` largest absolute values, int64 [R, count], in no particular order."""
    width = rows.shape[1]
    if rows.device.type == "cpu" and width >= SAMPLED_WIDTH and count * 8 <= width:
        return torch.stack([_largest_by_sample(row, count) for row in rows])
    return rows.abs().topk(count, dim=1, sorted=False).indices


def _largest_by_sample(row: Tensor, count: int) -> Tensor:
    """The exact choice among those above a threshold that a sample suggests (after Lin et al. 2018, section 5).

    The threshold lies three standard deviations lower than expected, so that too few rarely pass; then all are
    searched. NaN counts as the largest.
    """
    sizes = row.abs()
    array = sizes.numpy()
    sample = array[::SAMPLE_STEP]
    expected = len(sample) * count / len(array)
    rank = len(sample) - 1 - int(expected + 3 * expected**0.5)
    threshold = np.partition(sample, rank)[rank]
    passing = np.flatnonzero(array >= threshold)
    if np.isnan(threshold) or len(passing) < count or len(passing) > len(array) // 4:
        return sizes.topk(count, sorted=False).indices
    cut = len(passing) - count
    return torch.from_numpy(passing[np.argpartition(array[passing], cut)[cut:]])


class MomentumCorrection(CodecCompressor):
    """topk with momentum m: the residual accumulates velocity; with Nesterov's, what it would have stepped by.

    Args:
        codec: a `TopK`.
        momentum: m of the optimiser, whose own it replaces.
        nesterov: v = v + m u + g instead of v + u.
    """

    codec: TopK

    def __init__(self, codec: TopK, momentum: float, nesterov: bool) -> None:
        super().__init__(codec, ("residual", VELOCITY))
        self.momentum, self.nesterov = momentum, nesterov

    def _taker(self, span: Range, gradients: Tensor) -> Take:
        assert self.residual is not None
        residual = self.residual[span[0] : span[1]]
        velocity = self.residuals[VELOCITY][span[0] : span[1]]

        def take(tile: Tile) -> Tensor:
            own = slice(tile.start, tile.stop)
            moving = velocity[own].mul_(self.momentum).add_(gradients[own])
            if self.nesterov:
                return residual[own].add_(moving, alpha=self.momentum).add_(gradients[own])
            return residual[own].add_(moving)

        return take

    def _encode(self, span: Range, gradients: Tensor, room: int = 0) -> Tensor:
        payload = super()._encode(span, gradients, room)
        positions = self.codec.positions(span, payload[: payload.numel() - room])
        self.residuals[VELOCITY][span[0] : span[1]].index_fill_(0, positions, 0.0)
        return payload
