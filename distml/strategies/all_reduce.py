"""`strategy: all_reduce`: every worker sums the gradients of all and applies the same update to its replica.

With `compression` the sum is of what every worker sends, and each keeps what it did not send: a part of its own half.
Momentum that compression accumulates (topk) is taken out of the optimiser. Clipping is by the norm of the mean
gradient that comes out of the exchange.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from torch import Tensor

from distml.exchange.channel import Group, WireGroup
from distml.exchange.compression.build import build_compressor
from distml.strategies.single import Single


class AllReduce(Single):
    """One collective per phase carries gradients, count, vote and rows: N + TAIL elements, or their payload."""

    def _build(self) -> None:
        super()._build()
        self.compressor = build_compressor(self.job, self.flat.layout, self.flat.weights)

    def _reduce(self, phase: int, message: Tensor, group: Group) -> None:
        if self.compressor is None:
            group.all_reduce(message)
        else:
            self.compressor.reduce(phase, message, cast(WireGroup, group))

    def own_state(self) -> dict[str, Any]:
        return {} if self.compressor is None else self.compressor.state()

    def load_own(self, state: Mapping[str, Any]) -> None:
        if self.compressor is not None:
            self.compressor.load_state(state)
