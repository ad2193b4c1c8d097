"""A synchronous update in shared memory: each worker is the server of a shard, and updates it in place for all.

    every worker: backward into its own gradients ── barrier ── for its shard: sum over workers, mean, clip, update,
                  zero ── barrier ── forward from the very weights that were updated

With several hosts the shards' sums meet at each host's leader, go over the wire as one vector, and are taken from
there. Nothing is copied on a host. A shard is cut into pieces that stay in the processor's cache from the first sum to
the last store; blocks, order of sums and norms are those of a server, so the result is bitwise the same.

Who waits for whom: everybody for everybody, twice per phase (once more with clipping, twice more between hosts).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from torch import Tensor

from distml.exchange.channel import Group
from distml.exchange.flat import COUNT, FRAMES, ROWS, TAIL, FlatModel
from distml.exchange.layout import Layout
from distml.exchange.segment import KeptStates, Regions, kept_regions
from distml.exchange.shared_memory import SharedMemoryGroup, host_regions, is_finite
from distml.spec.schema import JobSpec, OptimizerSpec
from distml.strategies.optimizer import FlatOptimizer, applied_optimizer
from distml.strategies.shard import Entry, Shard

PIECE_ELEMENTS = 2**19  # of a shard: 2 MiB of each vector in float32; smaller ones cost calls, larger ones the cache

Reduce = Callable[[int, Tensor, Group], None]
"""Replace a phase's message by its sum over the ranks of a group: (phase, message, group)."""


def sync_regions(flat: FlatModel, moments: list[str], size: int, keeps: bool) -> Regions:
    """The segment of one host with `size` workers: everyone's gradients, one set of weights and moments.

    `keeps`: also the states that are kept for a recovery.
    """
    numel, kind = flat.layout.numel, str(flat.weights.dtype).removeprefix("torch.")
    return Regions.build(
        [
            *host_regions(size),
            ("norms", len(flat.layout.blocks), "float64"),
            ("weights", numel, kind),
            *((f"gradients-{index}", flat.gradients.numel(), kind) for index in range(size)),
            *((f"moment-{name}", numel, kind) for name in moments),
            *(kept_regions(numel, kind, moments, size) if keeps else ()),
        ]
    )


def pieces(layout: Layout, index: int, count: int) -> list[tuple[int, int]]:
    """Shard `index` of `count`, in runs of whole blocks of about `PIECE_ELEMENTS`."""
    start, stop = layout.shard(index, count)
    cuts = [start]
    for begin, end in layout.blocks:
        if start < begin and end <= stop and begin - cuts[-1] >= PIECE_ELEMENTS:
            cuts.append(begin)
    return [(a, b) for a, b in zip(cuts, [*cuts[1:], stop], strict=True) if a < b]


class InPlaceUpdate:
    """This worker's part of every update.

    Args:
        job: the spec.
        flat: the replica; its weights and gradients move into the segment.
        group: of shared memory.
        updates: steps so far.
        budget: steps of the run, for schedules without an end of their own.
        reduce: how leaders sum over hosts.
    """

    def __init__(
        self, job: JobSpec, flat: FlatModel, group: SharedMemoryGroup, updates: int, budget: int | None, reduce: Reduce
    ) -> None:
        self.job, self.flat, self.group, self.reduce = job, flat, group, reduce
        self.host, self.updates = group.host, updates
        segment = self.host.segment
        self.norms = segment.array("norms")
        self.everyones = [segment.tensor(f"gradients-{index}") for index in range(self.host.size)]
        flat.bind(segment.tensor("weights"), self.everyones[self.host.index])
        self.moments = {name.removeprefix("moment-"): segment.tensor(name)
                        for name in segment.regions.places if name.startswith("moment-")}  # fmt: skip
        layout = flat.layout
        self.shards = [self._shard(own, updates, budget) for own in pieces(layout, self.host.index, self.host.size)]
        self.own_range = layout.shard(self.host.index, self.host.size)
        self.first_block = [start for start, _ in layout.blocks]
        keeps = "kept-versions" in segment.regions.places
        self.kept = KeptStates(segment, self.host.index) if keeps else None

    def _shard(self, own: tuple[int, int], updates: int, budget: int | None) -> Shard:
        weights = self.flat.weights[own[0] : own[1]]
        optimizer = FlatOptimizer(applied_optimizer(self.job), self.flat.layout, own, weights, budget)
        optimizer.moments = {name: vector[own[0] : own[1]] for name, vector in self.moments.items()}
        shard = Shard(self.job, self.flat.layout, own, budget)
        shard.attach(weights, optimizer, updates)
        return shard

    def live_optimizer(self) -> OptimizerSpec:
        """The block by which this worker updates its shard, or (an empty one) would."""
        return self.shards[0].optimizer.spec if self.shards else applied_optimizer(self.job)

    def load(self, moments: Mapping[str, Tensor], updates: int) -> None:
        """Continue from whole moments [N]: each worker takes its shard's part."""
        start, stop = self.own_range
        for name, vector in self.moments.items():
            vector[start:stop] = moments[name][start:stop]
        self.updates = updates
        for shard in self.shards:
            shard.optimizer.updates = updates

    def keep(self, version: int) -> None:
        """Keep this worker's shard of weights and moments as a part of the state at `version`.

        Raises:
            FloatingPointError: the weights are not finite.
        """
        own = slice(*self.own_range)
        if not is_finite(self.flat.weights[own]):
            raise FloatingPointError(f"the weights are not finite at step {version}")
        assert self.kept is not None
        self.kept.write(version, {"weights": self.flat.weights, **self.moments}, own)

    def update(self, phase: int, version: int, last: bool, needs_norm: bool) -> tuple[list[float], float | None]:
        """Take part in the update of one phase that makes `version` + 1 (or a part of it).

        Returns:
            The summed tail of the messages (count, votes, rows, frames), and the mean gradient's norm, if it is needed.
        """
        messages = [self._message(gradients, phase) for gradients in self.everyones]
        self.host.at("gradients")
        self.host.barrier("the gradients of all workers")
        if len(self.group.hosts) > 1:
            messages = [self._sum_over_hosts(messages, phase)]
        tail = messages[0][-TAIL:].clone()
        for message in messages[1:]:
            tail += message[-TAIL:]
        sums = tail.tolist()
        members = [(index, 0) for index in range(len(messages))]
        entry = Entry(version, phase, members, sums[COUNT], sums[ROWS], sums[FRAMES], version, last, needs_norm)
        norm = self._apply(entry, messages)
        self.host.at("weights")
        self.host.barrier("the new weights")
        if needs_norm and norm is None:
            norm = self._norm(phase)
        self.group.count_bytes(messages[0].numel() * messages[0].element_size())
        self.updates += last
        return sums, norm

    def _message(self, gradients: Tensor, phase: int) -> Tensor:
        start, stop = self.flat.layout.phase_range(phase)
        return gradients[start + TAIL * phase : stop + TAIL * (phase + 1)]

    def _apply(self, entry: Entry, messages: list[Tensor]) -> float | None:
        """Reduce, clip and update this worker's pieces; everyone's gradients of them are zero then."""
        clips = self.job.optimizer.clip_norm is not None
        for shard in self.shards:
            own = shard.phase_slice(entry.phase)
            for index, message in enumerate(messages):
                shard.hold(index, 0, message[own])
            self._store_norms(shard, entry.phase, shard.reduce(entry))
            if not clips:
                self._finish(shard, entry, None)
        if not clips:
            return None
        self.host.barrier("the norms of all shards")
        norm = self._norm(entry.phase)
        for shard in self.shards:
            self._finish(shard, entry, norm)
        return norm

    def _finish(self, shard: Shard, entry: Entry, norm: float | None) -> None:
        shard.apply(entry, norm)
        self.host.at("sums")
        own = shard.phase_slice(entry.phase)
        for gradients in self.everyones:
            self._message(gradients, entry.phase)[own].zero_()

    # ----------------------------------------------------------------------------------------------------------- norms
    def _store_norms(self, shard: Shard, phase: int, squares: list[float]) -> None:
        if squares:
            first = max(shard.range[0], self.flat.layout.phase_range(phase)[0])
            index = self.first_block.index(first)
            self.norms[index : index + len(squares)] = squares

    def _norm(self, phase: int) -> float:
        """Of the whole mean gradient: the blocks' squares are added in their order, whoever computed them."""
        start, stop = self.flat.layout.phase_range(phase)
        squares = [float(square) for square, first in zip(self.norms, self.first_block, strict=True)
                   if start <= first < stop]  # fmt: skip
        return math.sqrt(sum(squares))

    # ----------------------------------------------------------------------------------------------------------- hosts
    def _sum_over_hosts(self, messages: list[Tensor], phase: int) -> Tensor:
        """Sum the shards over the workers of this host, then as a whole over the hosts, in the leader's message."""
        total, own = messages[0], self._own_slice(phase)
        for message in messages[1:]:
            total[own] += message[own]
        self.host.barrier("the sums of this host")
        if self.group.wire is not None:
            for message in messages[1:]:
                total[-TAIL:] += message[-TAIL:]
            self.reduce(phase, total, self.group.wire)
        self.host.barrier("the sums of all hosts")
        return total

    def _own_slice(self, phase: int) -> slice:
        first, last = self.flat.layout.phase_range(phase)
        start, stop = max(self.own_range[0], first), min(self.own_range[1], last)
        return slice(start - first, max(start, stop) - first)
