"""`strategy: local_sgd`: every worker takes H inner steps of its own, then all take one outer update together.

Dataflow of a round. All workers begin it with the same weights θ. Each one steps H times by its own optimiser on its
own slice of the batches, and exchanges nothing. Then each puts its outer gradient θ - θ_r, times the count that it
comes from, into the flat gradient vector; one reduction sums vectors and counts, and everybody makes the same outer
update of θ by the quotient:

    average     θ - mean(θ - θ_r), the mean of the workers' weights (Stich 2019)
    nesterov    SGD with Nesterov's momentum on mean(θ - θ_r) (DiLoCo, Douillard et al. 2023)

Rounds end at the multiples of H, and where `stop.steps` cuts the last one short: so the run ends with one model. There
only do workers hear of each other: budgets of examples, epochs, frames and seconds, votes to stop, evaluations,
checkpoints and snapshots wait for the next round's end, and what a death costs is at most what came since the last
round's end at or after a snapshot was due. Within a round `progress.examples` and `progress.frames` are this worker's
own scaled up to all workers (exact for datasets). Buffers and `after_update` are each worker's own until an evaluation
or checkpoint averages the buffers.

State: shared are the weights, the outer momentum, and rank 0's inner moments, from which another strategy, or a worker
that is new, goes on (zero moments at Adam's late step count would make its first steps several times too long). The
other ranks' inner moments are their own half.

Shapes: N elements; one message per round of N, and a tail for each phase.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from distml.exchange.channel import Channel, Group
from distml.exchange.flat import COUNT, FRAMES, ROWS, TAIL, VOTE, CopyVector, copy_vector, from_numpy, to_numpy
from distml.exchange.segment import KeptStates, Regions, kept_regions
from distml.exchange.shared_memory import CACHE_LINE, SharedMemoryGroup, host_regions, is_finite
from distml.spec.schema import GroupSpec, JobSpec, LocalSGDSpec, NesterovSpec, SGDSpec
from distml.strategies.agenda import Spent
from distml.strategies.optimizer import FlatOptimizer
from distml.strategies.single import Single

OUTER_MOMENTUM = "outer_momentum"


def outer_spec(job: JobSpec) -> SGDSpec:
    """The outer optimiser as one of ours: averaging is SGD of rate 1 on the mean outer gradient."""
    assert isinstance(job.strategy, LocalSGDSpec)
    outer, groups = job.strategy.outer, [GroupSpec(match=group.match) for group in job.optimizer.groups]
    if not isinstance(outer, NesterovSpec):
        return SGDSpec(name="sgd", lr=1.0, groups=groups)
    return SGDSpec(name="sgd", lr=outer.lr, momentum=outer.momentum, nesterov=outer.momentum > 0, groups=groups)


class LocalSGD(Single):
    """A replica that is updated alone within a round, and together with the others at its end."""

    updates_in_place = False  # the replicas differ

    def _build(self) -> None:
        super()._build()
        assert isinstance(self.job.strategy, LocalSGDSpec)
        layout = self.flat.layout
        self.inner_steps = self.job.strategy.inner_steps
        self.outer = FlatOptimizer(outer_spec(self.job), layout, (0, layout.numel), self.flat.weights, None)
        self.start = self.flat.weights.clone()
        self.filled = [phase for phase in self.phases if layout.phase_range(phase)[1]]  # phases with parameters
        batch_size, rank, size = self.job.batch_size, self.rank, self.world_size
        self.share = batch_size * (rank + 1) // size - batch_size * rank // size
        self._begin_round()

    def _begin_round(self) -> None:
        self.round_start = self.spent
        self.counts = dict.fromkeys(self.phases, 0.0)
        self.rows = self.frames = 0.0

    def regions(self, size: int, keeps: bool) -> Regions:
        gradients = self.flat.gradients
        longest = max(
            gradients.numel() * gradients.element_size(),
            8 * (self.carried.average_vector().numel() + self.carried.sums_vector().numel() + 1),
        )
        row_bytes = math.ceil(longest / CACHE_LINE) * CACHE_LINE
        kind, names = str(self.flat.weights.dtype).removeprefix("torch."), list(self._vectors())
        kept = kept_regions(self.flat.layout.numel, kind, names[1:], 1) if keeps else []
        return Regions.build([*host_regions(size), ("scratch", size * row_bytes, "uint8"), *kept])

    def connect(self, group: Group | None, channel: Channel | None) -> None:
        super().connect(group, channel)
        self.kept: KeptStates | None = None
        if isinstance(group, SharedMemoryGroup) and "kept-versions" in group.host.segment.regions.places:
            self.kept = KeptStates(group.host.segment, 0)

    def kept_state(self) -> dict[str, Any] | None:
        group = self.group
        if self.kept is None or not isinstance(group, SharedMemoryGroup):
            return None
        if not is_finite(self.flat.weights):
            raise FloatingPointError(f"the weights are not finite at step {self.progress.version}")
        if group.host.index == 0:
            self.kept.write(self.progress.version, self._vectors(), slice(None))
        return {"carried": self.carried.arrays(), "clock": {**self.clock_state(), "updates": self.optimizer.updates}}

    def _vectors(self) -> dict[str, Tensor]:
        """The shared half's vectors."""
        found = {"weights": self.flat.weights, **self.optimizer.moments}
        for vector in self.outer.moments.values():  # one, or none under averaging
            found[OUTER_MOMENTUM] = vector
        return found

    def _update(self, phase: int, count: float, last: bool) -> None:
        self._apply(self.flat.phase_message(phase)[:-TAIL], count, phase, last)
        self.counts[phase] += count
        if not last:
            return
        self.rows += self._rows
        self.frames += self._frames
        version = self.progress.version + 1
        if version % self.inner_steps == 0 or version == self.agenda.max_steps:
            self._end_round(version)
        else:
            scale = self.job.batch_size / self.share
            self._advance(self._in_round(version, self.rows * scale, self.frames * scale), None, ())

    def _in_round(self, version: int, rows: float, frames: float) -> Spent:
        """What the run has used up when so much has come since the round's start."""
        start = self.round_start
        return Spent(version, start.examples + round(rows), start.frames + round(frames))

    def _end_round(self, version: int) -> None:
        """The outer update: the round's one exchange."""
        self._pack()
        before = self.group.bytes_sent
        self.group.all_reduce(self.flat.gradients)
        self.meter.bytes_sent += self.group.bytes_sent - before
        self.flat.weights.copy_(self.start)
        for phase in self.filled:
            message = self.flat.phase_message(phase)
            tail = message[-TAIL:].tolist()
            if tail[COUNT]:
                message[:-TAIL].div_(tail[COUNT])
            self.outer.update(self.flat.weights, message[:-TAIL], phase, version - 1)
        self.start.copy_(self.flat.weights)
        self.flat.gradients.zero_()
        spent = self._in_round(version, tail[ROWS], tail[FRAMES])
        finished = self.agenda.spent(spent) or self.verdict(tail[VOTE])
        self._advance(spent, finished, self.agenda.duties(version, finished, since=self.round_start.version))
        self._begin_round()

    def _pack(self) -> None:
        """Each phase's outer gradient times its count, and the tails, where the gradients were."""
        torch.sub(self.start, self.flat.weights, out=self.flat.weights)
        for phase in self.filled:
            message = self.flat.phase_message(phase)
            torch.mul(self.flat.phase_weights(phase), self.counts[phase], out=message[:-TAIL])
            message[-TAIL + COUNT] = self.counts[phase]
        message[-TAIL + VOTE], message[-TAIL + ROWS], message[-TAIL + FRAMES] = self.vote, self.rows, self.frames

    # ----------------------------------------------------------------------------------------------------------- state
    def shared_state(self, copy: CopyVector = copy_vector) -> dict[str, Any]:
        shared = super().shared_state(copy)
        for vector in self.outer.moments.values():  # one, or none under averaging
            shared["moments"][OUTER_MOMENTUM] = copy(vector)
        return shared

    def load_shared(self, shared: Mapping[str, Any]) -> None:
        super().load_shared(shared)
        for vector in self.outer.moments.values():
            saved = shared["moments"].get(OUTER_MOMENTUM)  # another strategy has none
            vector.copy_(from_numpy(saved)) if saved is not None else vector.zero_()
        self.start.copy_(self.flat.weights)
        self._begin_round()

    def own_state(self) -> dict[str, Any]:
        if self.rank == 0:  # the shared half has them
            return {}
        return {"inner": {name: to_numpy(vector).copy() for name, vector in self.optimizer.moments.items()}}

    def load_own(self, state: Mapping[str, Any]) -> None:
        for name, moment in state.get("inner", {}).items():
            if name in self.optimizer.moments:
                self.optimizer.moments[name].copy_(from_numpy(moment))
