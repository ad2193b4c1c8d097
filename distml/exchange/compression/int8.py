"""int8: eight bits per element and one float32 scale per row of 1,024 elements: almost 4 x fewer bytes.

A row's scale maps its largest absolute value to 127 (as in Dettmers et al. 2022, block-wise and linear). NaN and
infinite values make their whole row NaN, so that they are seen.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from distml.exchange.compression.base import Codec, Range, Take, Tile, padded
from distml.exchange.layout import Layout

ROW_ELEMENTS = 1_024
LEVELS = 127


@dataclass
class Sections:
    """Typed views of a payload."""

    scales: Tensor  # float32 [rows]
    values: Tensor  # int8 [n]


class Int8(Codec):
    """Payload: scales float32 [rows], then values int8 [n]."""

    def __init__(self, layout: Layout, like: Tensor) -> None:
        super().__init__(layout, like, width=min(ROW_ELEMENTS, layout.block_size))
        self.room = torch.empty(0, dtype=self.dtype, device=self.device)

    def _num_rows(self, span: Range) -> int:
        return sum(tile.num_rows for tile in self.tiles(span))

    def num_bytes(self, span: Range) -> int:
        return padded(4 * self._num_rows(span)) + padded(span[1] - span[0])

    def _sections(self, span: Range, payload: Tensor) -> Sections:
        rows = self._num_rows(span)
        start = padded(4 * rows)
        values = payload[start : start + span[1] - span[0]].view(torch.int8)
        return Sections(payload[: 4 * rows].view(torch.float32), values)

    def encode(self, span: Range, take: Take, payload: Tensor) -> None:
        sections, row = self._sections(span, payload), 0
        smallest = torch.finfo(torch.float32).tiny  # a row of zeros has no scale
        for tile in self.tiles(span):
            corrected = take(tile).view(-1, tile.width)
            scales = sections.scales[row : row + tile.num_rows].view(-1, 1)
            levels = self._scratch(tile)
            largest = torch.abs(corrected, out=levels).amax(1, keepdim=True)
            scales.copy_(largest.div_(LEVELS).clamp_(min=smallest))
            torch.div(corrected, scales, out=levels).round_()
            sections.values[tile.start : tile.stop].view(-1, tile.width).copy_(levels)
            corrected.sub_(levels.mul_(scales))
            row += tile.num_rows

    def decode(self, span: Range, payloads: Sequence[Tensor], total: Tensor) -> None:
        parts, row = [self._sections(span, payload) for payload in payloads], 0
        for tile in self.tiles(span):
            piece = total[tile.start : tile.stop].view(-1, tile.width)
            self._read(parts[0], tile, row, piece)
            for part in parts[1:]:
                piece.add_(self._read(part, tile, row, self._scratch(tile)))
            row += tile.num_rows

    def _read(self, part: Sections, tile: Tile, row: int, out: Tensor) -> Tensor:
        """A tile's values [rows, width], in `out`."""
        scales = part.scales[row : row + tile.num_rows].view(-1, 1)
        return out.copy_(part.values[tile.start : tile.stop].view(-1, tile.width)).mul_(scales)

    def _scratch(self, tile: Tile) -> Tensor:
        """Room for a tile [rows, width]; the same for all of them, so that it stays in the processor's cache."""
        size = tile.stop - tile.start
        if self.room.numel() < size:
            self.room = torch.empty(size, dtype=self.dtype, device=self.device)
        return self.room[:size].view(-1, tile.width)
