"""`strategy: all_reduce`: every worker sums the gradients of all and applies the same update to its replica.

With `compression` the sum is of what every worker sends, and each keeps what it did not send: a part of its own half.
Momentum that compression accumulates (topk) is taken out of the optimiser. Clipping is by the norm of the mean
gradient that comes out of the exchange.

Where a process group is better used while backward runs, DDP sums the gradients there; the tail follows by itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from torch import Tensor

from distml.exchange.channel import Channel, Group, WireGroup
from distml.exchange.compression.build import build_compressor
from distml.exchange.ddp import OverlappedReduction
from distml.exchange.flat import TAIL
from distml.exchange.process_group import ProcessGroup
from distml.strategies.single import Single
from distml.tasks.base import Loss


class AllReduce(Single):
    """One collective per phase carries gradients, count, vote, rows and frames: N + TAIL elements, or their payload."""

    def _build(self) -> None:
        super()._build()
        self.compressor = build_compressor(self.job, self.flat.layout, self.flat.weights)
        self.overlapped: OverlappedReduction | None = None

    def connect(self, group: Group | None, channel: Channel | None) -> None:
        super().connect(group, channel)
        if self.overlapped is not None:
            self.overlapped.close()
        self.overlapped = None
        if isinstance(group, ProcessGroup) and group.overlaps and self._can_overlap:
            self.overlapped = OverlappedReduction(self.module, self.flat.parameters, group)

    @property
    def _can_overlap(self) -> bool:
        """DDP waits for every parameter in each backward, and leaves no room for a collective within the loss."""
        return self.compressor is None and len(self.phases) == 1 and "group_mean" not in self.task.needs

    def _forward(self, last: bool, *arguments: Any) -> Loss:
        if self.overlapped is None or not last:
            return super()._forward(last, *arguments)
        loss: Loss = self.overlapped(*arguments)
        return loss

    def _backward(self, total: Tensor) -> None:
        if self.overlapped is None:
            super()._backward(total)
        else:
            before = self.group.bytes_sent
            self.overlapped.backward(total)
            self.meter.bytes_sent += self.group.bytes_sent - before

    def _reduce(self, phase: int, message: Tensor, group: Group) -> None:
        if self.overlapped is not None:
            group.all_reduce(message[-TAIL:])
        elif self.compressor is None:
            group.all_reduce(message)
        else:
            self.compressor.reduce(phase, message, cast(WireGroup, group))

    def own_state(self) -> dict[str, Any]:
        return {} if self.compressor is None else self.compressor.state()

    def load_own(self, state: Mapping[str, Any]) -> None:
        if self.compressor is not None:
            self.compressor.load_state(state)
