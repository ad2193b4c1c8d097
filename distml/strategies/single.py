"""`strategy: single`: one worker, its own optimiser. Also the replica's half of `all_reduce`.

Dataflow of one phase: gradients and tail [N + TAIL] -> `_reduce` -> mean -> clip -> update in place. In shared memory
`InPlaceUpdate` does the same for a shard of the vector that all workers of the host see.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from distml.exchange.channel import Channel, Group
from distml.exchange.compression.build import compression_of
from distml.exchange.flat import COUNT, TAIL, CopyVector, borrowed, copy_vector
from distml.exchange.segment import Regions
from distml.exchange.shared_memory import SharedMemoryGroup
from distml.spec.schema import JobSpec, OptimizerSpec
from distml.strategies.in_place import InPlaceUpdate, sync_regions
from distml.strategies.optimizer import (
    FlatOptimizer,
    applied_optimizer,
    block_square_norms,
    clip_scale,
    written_optimizer,
)
from distml.strategies.replica import Replica


class Alone:
    """A group of one."""

    rank, size, bytes_sent = 0, 1, 0

    def all_reduce(self, vector: Tensor) -> None:
        """The sum over one rank."""

    def all_gather(self, payload: bytes) -> list[bytes]:
        """One rank's payload."""
        return [payload]

    def all_to_all(self, parts: Sequence[Tensor], lengths: Sequence[int]) -> list[Tensor]:
        """One rank's part."""
        return list(parts)


class Single(Replica):
    """Every worker that runs this holds the whole optimiser and applies the same update."""

    updates_in_place = True  # where a segment of shared memory can hold the weights

    def _build(self) -> None:
        layout = self.flat.layout
        whole = (0, layout.numel)
        spec = applied_optimizer(self.job)
        self.optimizer = FlatOptimizer(spec, layout, whole, self.flat.weights, self.agenda.budget_steps)
        self._group: Group = Alone()
        self.in_place: InPlaceUpdate | None = None

    def connect(self, group: Group | None, channel: Channel | None) -> None:
        self._group, self.in_place = group or Alone(), None
        if isinstance(group, SharedMemoryGroup) and self.updates_in_place:
            updates, budget = self.optimizer.updates, self.agenda.budget_steps
            self.in_place = InPlaceUpdate(self.job, self.flat, group, updates, budget, self._reduce)
            self.optimizer.moments = self.in_place.moments
        self.leaves_gradients = self.in_place is None

    def retune(self, job: JobSpec) -> None:
        if self.in_place is not None or compression_of(job) is not None:
            super().retune(job)  # others have its moments too; ranks accumulate its momentum
        self.job = self.agenda.job = job
        self.optimizer.change_rule(applied_optimizer(job))

    def live_optimizer(self) -> OptimizerSpec:
        spec = self.optimizer.spec if self.in_place is None else self.in_place.live_optimizer()
        return written_optimizer(spec, self.job)

    def regions(self, size: int, keeps: bool) -> Regions:
        return sync_regions(self.flat, list(self.optimizer.moments), size, keeps)

    @property
    def group(self) -> Group:
        return self._group

    def _reduce(self, phase: int, message: Tensor, group: Group) -> None:
        """Sum one phase's gradients and tail over the ranks of a group, in place."""
        group.all_reduce(message)

    def _update(self, phase: int, count: float, last: bool) -> None:
        before = self.group.bytes_sent
        if self.in_place is not None:
            version = self.progress.version
            needs_norm = self._needs_norm(version, last)
            tail, norm = self.in_place.update(phase, version, last, needs_norm)
            self.meter.grad_norm = self.meter.grad_norm if norm is None else norm
        else:
            message = self.flat.phase_message(phase)
            self._reduce(phase, message, self.group)
            tail = message[-TAIL:].tolist()
            self._apply(message[:-TAIL], tail[COUNT], phase, last)
        self.meter.bytes_sent += self.group.bytes_sent - before
        if last:
            self._end_step(tail)

    def _apply(self, gradients: Tensor, count: float, phase: int, last: bool) -> None:
        """Update one phase's weights by a sum over `count`: mean, clip, optimiser."""
        if count:
            gradients.div_(count)
        version = self.progress.version
        if self._needs_norm(version, last):
            norms = block_square_norms(self.flat.layout, gradients, (0, self.flat.layout.numel), phase)
            self.meter.grad_norm = norm = math.sqrt(sum(norms))
            if (scale := clip_scale(norm, self.job.optimizer.clip_norm)) < 1.0:
                gradients.mul_(scale)
        self.optimizer.update(self.flat.weights, gradients, phase, version)
        if last:
            self.optimizer.step_done()

    def shared_state(self, copy: CopyVector = copy_vector) -> dict[str, Any]:
        return {
            "weights": copy(self.flat.weights),
            "moments": {name: copy(vector) for name, vector in self.optimizer.moments.items()},
            "carried": self.carried.arrays(),
            "clock": {**self.clock_state(), "updates": self._updates},
        }

    def kept_state(self) -> dict[str, Any] | None:
        if self.in_place is None or self.in_place.kept is None:
            return None
        self.in_place.keep(self.progress.version)
        return {"carried": self.carried.arrays(), "clock": {**self.clock_state(), "updates": self._updates}}

    @property
    def _updates(self) -> int:
        return self.optimizer.updates if self.in_place is None else self.in_place.updates

    def load_shared(self, shared: Mapping[str, Any]) -> None:
        super().load_shared(shared)
        known, updates = shared["moments"], shared["clock"]["updates"]
        moments = {name: borrowed(known[name]) if name in known else torch.zeros_like(vector)
                   for name, vector in self.optimizer.moments.items()}  # fmt: skip
        if self.in_place is not None:
            self.in_place.load(moments, updates)
            return
        for name, vector in self.optimizer.moments.items():
            vector.copy_(moments[name])
        self.optimizer.updates = updates
