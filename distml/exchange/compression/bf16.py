"""bf16: the upper half of every float32, 2 bytes per element.

A float's difference to its own rounding is a float: what is sent and what stays add up exactly.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from distml.exchange.compression.base import Codec, Range, Take, padded
from distml.exchange.layout import Layout


class BF16(Codec):
    """Payload: bfloat16 [n]."""

    def __init__(self, layout: Layout, like: Tensor) -> None:
        super().__init__(layout, like, width=1)

    def num_bytes(self, span: Range) -> int:
        return padded(2 * (span[1] - span[0]))

    def _values(self, span: Range, payload: Tensor) -> Tensor:
        return payload.view(torch.bfloat16)[: span[1] - span[0]]

    def encode(self, span: Range, take: Take, payload: Tensor) -> None:
        values = self._values(span, payload)
        for tile in self.tiles(span):
            corrected = take(tile)
            corrected.sub_(values[tile.start : tile.stop].copy_(corrected))

    def decode(self, span: Range, payloads: Sequence[Tensor], total: Tensor) -> None:
        parts = [self._values(span, payload) for payload in payloads]
        for tile in self.tiles(span):
            piece = total[tile.start : tile.stop].copy_(parts[0][tile.start : tile.stop])
            for part in parts[1:]:
                piece.add_(part[tile.start : tile.stop])
