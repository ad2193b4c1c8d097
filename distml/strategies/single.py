"""`strategy: single`: one worker, its own optimiser. Also the replica's half of `all_reduce`.

Dataflow of one phase: gradients and tail [N + TAIL] -> `_reduce` (nothing here) -> mean -> clip -> update in place.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from distml.exchange.channel import Channel, Group
from distml.exchange.flat import COUNT, ROWS, TAIL, VOTE, from_numpy, to_numpy
from distml.strategies.agenda import crossed
from distml.strategies.base import Strategy
from distml.strategies.optimizer import FlatOptimizer, block_square_norms, clip_scale


class Alone:
    """A group of one."""

    rank, size, bytes_sent = 0, 1, 0

    def all_reduce(self, vector: Tensor) -> None:
        """The sum over one rank."""

    def all_gather(self, payload: bytes) -> list[bytes]:
        """One rank's payload."""
        return [payload]


class Single(Strategy):
    """Every worker that runs this holds the whole optimiser and applies the same update."""

    def _build(self) -> None:
        layout = self.flat.layout
        whole = (0, layout.numel)
        self.optimizer = FlatOptimizer(self.job.optimizer, layout, whole, self.flat.weights, self.agenda.budget_steps)
        self._group: Group = Alone()

    def connect(self, group: Group | None, channel: Channel | None) -> None:
        self._group = group or Alone()

    @property
    def group(self) -> Group:
        return self._group

    def _reduce(self, message: Tensor) -> None:
        """Sum one phase's gradients and tail over the workers, in place."""

    def _exchange(self, phase: int, count: float, last: bool) -> None:
        message = self.flat.phase_message(phase)
        self._reduce(message)
        gradients, tail = message[:-TAIL], message[-TAIL:].tolist()
        if tail[COUNT]:
            gradients.div_(tail[COUNT])
        version = self.progress.version
        limit = self.job.optimizer.clip_norm
        if limit is not None or (last and crossed(version, version + 1, self.job.log.every)):
            norms = block_square_norms(self.flat.layout, gradients, (0, self.flat.layout.numel), phase)
            self.meter.grad_norm = norm = math.sqrt(sum(norms))
            if (scale := clip_scale(norm, limit)) < 1.0:
                gradients.mul_(scale)
        self.optimizer.update(self.flat.weights, gradients, phase, version)
        if last:
            self.optimizer.step_done()
            examples = self.progress.examples + round(tail[ROWS])
            finished = self.agenda.spent(version + 1, examples) or self.verdict(tail[VOTE])
            self._advance(version + 1, examples, finished, self.agenda.duties(version + 1, finished))

    def shared_state(self) -> dict[str, Any]:
        return {
            "weights": to_numpy(self.flat.weights).copy(),
            "moments": {name: to_numpy(vector).copy() for name, vector in self.optimizer.moments.items()},
            "carried": self.carried.arrays(),
            "clock": {**self.clock_state(), "updates": self.optimizer.updates},
        }

    def load_shared(self, shared: Mapping[str, Any]) -> None:
        super().load_shared(shared)
        for name, vector in self.optimizer.moments.items():
            vector.copy_(from_numpy(shared["moments"][name]))
        self.optimizer.updates = shared["clock"]["updates"]
